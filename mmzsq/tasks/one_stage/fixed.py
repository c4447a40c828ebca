# SPDX-License-Identifier: Apache-2.0
"""Heads whose assignment follows from labels and places alone: RetinaNet's, ATSS's, GFL's and FCOS's.

MMDetection's own assigners make the targets, image by image, once for a set of labels. A step is the loss of all
places, which equals the head's ``loss_by_feat``, summed over its terms and levels, with masks in the place of
selections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.structures.bbox import bbox2distance, distance2bbox
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.boxes import DeltaCoder, paired_iou
from mmzsq.tasks.elementwise_losses import box_errors, elementwise, one_hot
from mmzsq.tasks.prediction_maps import flatten_maps


class FixedTargets(NamedTuple):
    """What the A places (anchors or points) of all levels are to learn in each of N images.

    Attributes:
        priors: Anchors, xyxy in pixels, (A, 4), or points, (A, 2).
        strides: Pixels between the places of a level, (A, 1).
        labels: Class, (N, A), long; the number of classes for background.
        positive: Answers for a label, (N, A), bool.
        weights: Of the class term, (N, A).
        bboxes: What to learn of the box, as the head says it, (N, A, 4); 0 for background.
        centerness: Of the place in its label, in [0, 1], (N, A); 0 for background.
        divisor: Of the class term: what MMDetection takes as the number of positive places, a scalar.
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
    """Targets of a head that predicts offsets from its anchors, and how it encodes them."""

    fixed: FixedTargets
    coder: DeltaCoder


def anchor_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> FixedTargets:
    """Assign labels to anchors as ``head`` does.

    Args:
        head: An ``AnchorHead`` with its training configuration.
        labels: One entry an image, on the device: ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,).
        map_sizes: Rows and columns of the head's maps.
        image_size: Height and width in pixels.
    """
    device = labels[0].bboxes.device
    metas = [dict(img_shape=image_size, pad_shape=image_size)] * len(labels)
    anchors = torch.cat(head.prior_generator.grid_priors(map_sizes, device=device))
    # ATSS's relatives return the anchors first.
    *_, by_level, weights, bboxes, _, count = head.get_targets(
        *head.get_anchors(map_sizes, metas, device=device), labels, metas
    )
    classes = torch.cat(by_level, dim=1)
    counts = [level.shape[1] for level in by_level]
    strides = torch.tensor([stride[0] for stride in head.prior_generator.strides], dtype=torch.float, device=device)
    return FixedTargets(
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
    """:func:`anchor_targets` with the coder of ``head``."""
    targets = anchor_targets(head, labels, map_sizes, image_size)
    return CodedTargets(targets, DeltaCoder.of(head.bbox_coder, targets.priors.device))


def atss_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> CodedTargets:
    """:func:`coded_anchor_targets` with the centerness of positive anchors."""
    targets, coder = coded_anchor_targets(head, labels, map_sizes, image_size)
    anchors = targets.priors.expand_as(targets.bboxes)
    positive = targets.positive
    targets.centerness[positive] = head.centerness_target(anchors[positive], targets.bboxes[positive])
    return CodedTargets(targets, coder)


def point_targets(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> FixedTargets:
    """Assign labels to points as ``head``, an ``FCOSHead``, does; see :func:`anchor_targets`."""
    device = labels[0].bboxes.device
    points = head.prior_generator.grid_priors(map_sizes, device=device)
    by_level, distances = head.get_targets(points, labels)
    classes = torch.cat([level.unflatten(0, (len(labels), -1)) for level in by_level], dim=1)
    bboxes = torch.cat([level.unflatten(0, (len(labels), -1)) for level in distances], dim=1)
    strides = [bboxes.new_full((len(level), 1), stride) for level, stride in zip(points, head.strides, strict=True)]
    positive = (classes >= 0) & (classes < head.num_classes)
    centerness = torch.zeros(classes.shape, device=device)
    centerness[positive] = head.centerness_target(bboxes[positive])
    return FixedTargets(
        priors=torch.cat(points),
        strides=torch.cat(strides),
        labels=classes,
        positive=positive,
        weights=torch.ones_like(centerness),
        bboxes=bboxes,
        centerness=centerness,
        divisor=positive.sum().clamp(min=1).float(),
    )


def retina_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: CodedTargets) -> Tensor:
    """Loss of a ``RetinaHead``, a scalar.

    Args:
        head: With its training configuration.
        maps: Class logits and box offsets of every level, as ``head`` returns them.
        targets: From :func:`coded_anchor_targets`.
    """
    fixed = targets.fixed
    errors = elementwise(head.loss_bbox, flatten_maps(maps[1], 4), fixed.bboxes)
    loss_bbox = (errors * fixed.positive[..., None]).sum() / fixed.divisor
    return focal_loss(head, maps[0], fixed) + loss_bbox


def atss_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: CodedTargets) -> Tensor:
    """Loss of an ``ATSSHead``, a scalar.

    Args:
        head: With its training configuration.
        maps: Class logits, box offsets and centerness of every level, as ``head`` returns them.
        targets: From :func:`atss_targets`.
    """
    fixed = targets.fixed
    bboxes = targets.coder.decode(fixed.priors, flatten_maps(maps[1], 4))
    norm = fixed.centerness.sum().clamp(min=1)
    return focal_loss(head, maps[0], fixed) + centered_loss(head, maps[2], bboxes, fixed.bboxes, fixed, norm)


def fcos_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: FixedTargets) -> Tensor:
    """Loss of an ``FCOSHead``, a scalar.

    Args:
        head: With its training configuration, acting as in training.
        maps: Class logits, distances and centerness of every level, as ``head`` returns them.
        targets: From :func:`point_targets`.
    """
    bboxes = distance2bbox(targets.priors, flatten_maps(maps[1], 4))
    goals = distance2bbox(targets.priors, targets.bboxes)
    norm = targets.centerness.sum().clamp(min=1e-6)
    return focal_loss(head, maps[0], targets) + centered_loss(head, maps[2], bboxes, goals, targets, norm)


def gfl_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: FixedTargets) -> Tensor:
    """Loss of a ``GFLHead``, a scalar.

    Args:
        head: With its training configuration.
        maps: Class logits and logits of distances of every level, as ``head`` returns them.
        targets: From :func:`anchor_targets`.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    distributions = flatten_maps(maps[1], 4 * (head.reg_max + 1)).unflatten(-1, (4, -1))
    # Boxes are in cells of their level. The sum is no matrix product, which autocast would round.
    points = head.anchor_center(targets.priors) / targets.strides
    distances = (distributions.softmax(-1) * head.integral.project).sum(-1)
    goals = targets.bboxes / targets.strides
    bboxes = distance2bbox(points, distances)
    with torch.no_grad():
        quality = torch.where(targets.positive, paired_iou(bboxes, goals), 0)
        weights = logits.sigmoid().amax(-1) * targets.positive
        norm = weights.sum().clamp(min=1)

    loss_bbox = (box_errors(head.loss_bbox, bboxes, goals, targets.positive) * weights).sum() / norm
    cells = bbox2distance(points, goals, head.reg_max)
    errors = head.loss_dfl(distributions.flatten(0, 2), cells.flatten(), reduction_override='none')
    loss_dfl = (errors.view_as(cells).mean(-1) * weights).sum() / norm
    wanted = one_hot(targets.labels, head.num_classes) * quality[..., None]
    loss_cls = (elementwise(head.loss_cls, logits, wanted) * targets.weights[..., None]).sum() / targets.divisor
    return loss_bbox + loss_dfl + loss_cls


def focal_loss(head: Any, maps: Sequence[Tensor], targets: FixedTargets) -> Tensor:
    """The class term of ``head``, whose loss takes labels as they are: a scalar."""
    logits = flatten_maps(maps, head.num_classes).flatten(0, 1)
    return head.loss_cls(logits, targets.labels.flatten(), targets.weights.flatten(), avg_factor=targets.divisor)


def centered_loss(
    head: Any, maps: Sequence[Tensor], bboxes: Tensor, goals: Tensor, targets: FixedTargets, norm: Tensor
) -> Tensor:
    """Box term, in which places weigh by their centerness, and centerness term: their sum, a scalar.

    Args:
        head: Tells the losses.
        maps: Logits of the centerness of every level.
        bboxes: Predicted boxes, (N, A, 4).
        goals: What they should be; anything for background.
        targets: The targets.
        norm: What the sum of the box term is divided by.
    """
    loss_bbox = (box_errors(head.loss_bbox, bboxes, goals, targets.positive) * targets.centerness).sum() / norm
    errors = elementwise(head.loss_centerness, flatten_maps(maps, 1), targets.centerness[..., None]).squeeze(-1)
    return loss_bbox + (errors * targets.positive).sum() / targets.divisor
