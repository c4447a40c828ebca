# SPDX-License-Identifier: Apache-2.0
"""Batched losses of heads with static label assignment: RetinaNet, ATSS, GFL, FCOS and YOLOv3.

The assignment depends only on the labels and the locations. MMDetection's own assigners compute the targets, image by
image, once per set of labels. In each step, the loss runs over all locations. It equals the head's ``loss_by_feat``,
summed over its terms and levels, but uses masks instead of selecting locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.structures.bbox import bbox2distance, distance2bbox
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.boxes import DeltaCoder, paired_iou
from mmzsq.tasks.elementwise_losses import elementwise_loss, one_hot, positive_box_loss
from mmzsq.tasks.prediction_maps import flatten_maps


class StaticTargets(NamedTuple):
    """Targets of the A locations (anchors or points) of all levels in each of N images.

    Attributes:
        priors: Anchors in xyxy pixels, (A, 4), or points, (A, 2).
        strides: Stride of each location's level in pixels, (A, 1).
        labels: Target class, (N, A), long; the number of classes for background.
        positive: Whether a location is matched to a label, (N, A), bool.
        weights: Weights of the class term, (N, A).
        bboxes: Regression target in the encoding of the head, (N, A, 4); 0 for background.
        centerness: Target centerness in [0, 1], (N, A); 0 for background.
        divisor: Divisor of the class term, a scalar: MMDetection's count of the positive locations.
    """

    priors: Tensor
    strides: Tensor
    labels: Tensor
    positive: Tensor
    weights: Tensor
    bboxes: Tensor
    centerness: Tensor
    divisor: Tensor


class CodedTargets(NamedTuple):
    """Targets of a head that predicts offsets from its anchors.

    Attributes:
        fixed: The targets.
        coder: Encoding of the offsets.
    """

    fixed: StaticTargets
    coder: DeltaCoder


def anchor_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> StaticTargets:
    """Assign labels to anchors with the assigner of ``head``.

    Args:
        head: An ``AnchorHead`` with its training configuration.
        labels: One entry per image, on the device, with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
        map_sizes: Rows and columns of the head's maps.
        image_size: Height and width in pixels.
    """
    device = labels[0].bboxes.device
    metas = [dict(img_shape=image_size, pad_shape=image_size)] * len(labels)
    anchors = torch.cat(head.prior_generator.grid_priors(map_sizes, device=device))
    # ATSS and heads derived from it return the anchors first.
    *_, by_level, weights, bboxes, _, count = head.get_targets(
        *head.get_anchors(map_sizes, metas, device=device), labels, metas
    )
    classes = torch.cat(by_level, dim=1)
    counts = [level.shape[1] for level in by_level]
    strides = torch.tensor([stride[0] for stride in head.prior_generator.strides], dtype=torch.float, device=device)
    return StaticTargets(
        priors=anchors,
        strides=strides.repeat_interleave(torch.tensor(counts, device=device))[:, None],
        labels=classes,
        positive=(classes >= 0) & (classes < head.num_classes),
        weights=torch.cat(weights, dim=1),
        bboxes=torch.cat(bboxes, dim=1),
        centerness=torch.zeros(classes.shape, device=device),
        divisor=torch.tensor(float(count), device=device),
    )


def coded_anchor_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> CodedTargets:
    """Return the targets of :func:`anchor_targets` together with the box coder of ``head``."""
    targets = anchor_targets(head, labels, map_sizes, image_size)
    return CodedTargets(targets, DeltaCoder.from_mmdet(head.bbox_coder, targets.priors.device))


def atss_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> CodedTargets:
    """Return the targets of :func:`coded_anchor_targets` with the centerness of positive anchors."""
    targets, coder = coded_anchor_targets(head, labels, map_sizes, image_size)
    anchors = targets.priors.expand_as(targets.bboxes)
    positive = targets.positive
    targets.centerness[positive] = head.centerness_target(anchors[positive], targets.bboxes[positive])
    return CodedTargets(targets, coder)


def point_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> StaticTargets:
    """Assign labels to points with the rules of ``head``, an ``FCOSHead``; see :func:`anchor_targets`."""
    device = labels[0].bboxes.device
    points = head.prior_generator.grid_priors(map_sizes, device=device)
    by_level, distances = head.get_targets(points, labels)
    classes = torch.cat([level.unflatten(0, (len(labels), -1)) for level in by_level], dim=1)
    bboxes = torch.cat([level.unflatten(0, (len(labels), -1)) for level in distances], dim=1)
    strides = [bboxes.new_full((len(level), 1), stride) for level, stride in zip(points, head.strides, strict=True)]
    positive = (classes >= 0) & (classes < head.num_classes)
    centerness = torch.zeros(classes.shape, device=device)
    centerness[positive] = head.centerness_target(bboxes[positive])
    return StaticTargets(
        priors=torch.cat(points),
        strides=torch.cat(strides),
        labels=classes,
        positive=positive,
        weights=torch.ones_like(centerness),
        bboxes=bboxes,
        centerness=centerness,
        divisor=positive.sum().clamp(min=1).float(),
    )


class GridTargets(NamedTuple):
    """Targets of YOLOv3 for N images.

    Attributes:
        maps: For each level, offsets, objectness and classes of its A anchors, (N, A, 5 + C).
        compared: For each level, 1 for anchors that count in the objectness term, else 0, (N, A).
    """

    maps: tuple[Tensor, ...]
    compared: tuple[Tensor, ...]


def grid_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> GridTargets:
    """Assign labels to the grid cells of ``head``, a ``YOLOV3Head``; see :func:`anchor_targets`."""
    device = labels[0].bboxes.device
    anchors = head.prior_generator.grid_priors(map_sizes, device=device)
    flags = [head.responsible_flags(map_sizes, image.bboxes, device) for image in labels]
    maps, negative = head.get_targets([anchors] * len(labels), flags, labels)
    compared = [(level.float() + target[..., 4]).clamp(max=1) for level, target in zip(negative, maps, strict=True)]
    return GridTargets(tuple(maps), tuple(compared))


def yolov3_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: GridTargets) -> Tensor:
    """Loss of a ``YOLOV3Head``.

    Args:
        head: The head with its training configuration.
        maps: One item, the maps of every level, as returned by ``head``.
        targets: Return value of :func:`grid_targets`.

    Returns:
        A scalar.
    """
    terms = []
    for level, wanted, compared in zip(maps[0], targets.maps, targets.compared, strict=True):
        found = flatten_maps([level], head.num_attrib)
        positive = wanted[..., 4]
        terms += [
            head.loss_cls(found[..., 5:], wanted[..., 5:], weight=positive[..., None]).mean(),
            head.loss_conf(found[..., 4], wanted[..., 4], weight=compared).mean(),
            head.loss_xy(found[..., :2], wanted[..., :2], weight=positive[..., None]).mean(),
            head.loss_wh(found[..., 2:4], wanted[..., 2:4], weight=positive[..., None]).mean(),
        ]
    return torch.stack(terms).sum()


def retina_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: CodedTargets) -> Tensor:
    """Loss of a ``RetinaHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits and box offsets of every level, as returned by ``head``.
        targets: Return value of :func:`coded_anchor_targets`.

    Returns:
        A scalar.
    """
    fixed = targets.fixed
    errors = elementwise_loss(head.loss_bbox, flatten_maps(maps[1], 4), fixed.bboxes)
    loss_bbox = (errors * fixed.positive[..., None]).sum() / fixed.divisor
    return focal_loss(head, maps[0], fixed) + loss_bbox


def atss_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: CodedTargets) -> Tensor:
    """Loss of an ``ATSSHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits, box offsets and centerness logits of every level, as returned by ``head``.
        targets: Return value of :func:`atss_targets`.

    Returns:
        A scalar.
    """
    fixed = targets.fixed
    bboxes = targets.coder.decode(fixed.priors, flatten_maps(maps[1], 4))
    norm = fixed.centerness.sum().clamp(min=1)
    return focal_loss(head, maps[0], fixed) + centerness_weighted_loss(head, maps[2], bboxes, fixed.bboxes, fixed, norm)


def fcos_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: StaticTargets) -> Tensor:
    """Loss of an ``FCOSHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits, distances and centerness logits of every level, as returned by ``head`` in training mode.
        targets: Return value of :func:`point_targets`.

    Returns:
        A scalar.
    """
    bboxes = distance2bbox(targets.priors, flatten_maps(maps[1], 4))
    goals = distance2bbox(targets.priors, targets.bboxes)
    norm = targets.centerness.sum().clamp(min=1e-6)
    return focal_loss(head, maps[0], targets) + centerness_weighted_loss(head, maps[2], bboxes, goals, targets, norm)


def gfl_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: StaticTargets) -> Tensor:
    """Loss of a ``GFLHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits and distance logits of every level, as returned by ``head``.
        targets: Return value of :func:`anchor_targets`.

    Returns:
        A scalar.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    distributions = flatten_maps(maps[1], 4 * (head.reg_max + 1)).unflatten(-1, (4, -1))
    # Boxes are in units of the stride. A sum instead of a matrix product, which autocast would compute in 16 bits.
    points = head.anchor_center(targets.priors) / targets.strides
    distances = (distributions.softmax(-1) * head.integral.project).sum(-1)
    goals = targets.bboxes / targets.strides
    bboxes = distance2bbox(points, distances)
    with torch.no_grad():
        quality = torch.where(targets.positive, paired_iou(bboxes, goals), 0)
        weights = logits.sigmoid().amax(-1) * targets.positive
        norm = weights.sum().clamp(min=1)

    loss_bbox = (positive_box_loss(head.loss_bbox, bboxes, goals, targets.positive) * weights).sum() / norm
    cells = bbox2distance(points, goals, head.reg_max)
    errors = head.loss_dfl(distributions.flatten(0, 2), cells.flatten(), reduction_override='none')
    loss_dfl = (errors.view_as(cells).mean(-1) * weights).sum() / norm
    wanted = one_hot(targets.labels, head.num_classes) * quality[..., None]
    loss_cls = (elementwise_loss(head.loss_cls, logits, wanted) * targets.weights[..., None]).sum() / targets.divisor
    return loss_bbox + loss_dfl + loss_cls


def focal_loss(head: Any, maps: Sequence[Tensor], targets: StaticTargets) -> Tensor:
    """Class term of a head whose loss takes class indices.

    Args:
        head: The head; its ``loss_cls`` is a ``FocalLoss``.
        maps: Class logits of every level, (N, anchors per cell * C, H, W).
        targets: Targets of the A locations.

    Returns:
        A scalar.
    """
    logits = flatten_maps(maps, head.num_classes).flatten(0, 1)
    return head.loss_cls(logits, targets.labels.flatten(), targets.weights.flatten(), avg_factor=targets.divisor)


def centerness_weighted_loss(
    head: Any, maps: Sequence[Tensor], bboxes: Tensor, goals: Tensor, targets: StaticTargets, norm: Tensor
) -> Tensor:
    """Sum of the box term, in which locations are weighted by their centerness, and the centerness term.

    Args:
        head: The head, which defines the losses.
        maps: Centerness logits of every level, (N, 1, H, W).
        bboxes: Predicted boxes, (N, A, 4).
        goals: Target boxes, (N, A, 4); arbitrary for background.
        targets: Targets of the A locations.
        norm: Divisor of the box term, a scalar.

    Returns:
        A scalar.
    """
    loss_bbox = (positive_box_loss(head.loss_bbox, bboxes, goals, targets.positive) * targets.centerness).sum() / norm
    errors = elementwise_loss(head.loss_centerness, flatten_maps(maps, 1), targets.centerness[..., None]).squeeze(-1)
    return loss_bbox + (errors * targets.positive).sum() / targets.divisor
