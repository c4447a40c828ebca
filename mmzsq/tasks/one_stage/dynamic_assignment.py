# SPDX-License-Identifier: Apache-2.0
"""Batched losses of heads with dynamic label assignment: YOLOX and RTMDet.

These heads assign labels from their predictions in every step. Each loss equals the head's ``loss_by_feat``, summed
over its terms and levels, but uses masks instead of selecting locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.structures.bbox import distance2bbox
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.tasks.elementwise_losses import elementwise_loss, one_hot, positive_box_loss
from mmzsq.tasks.one_stage.matching import Match, match_sim_ota, match_soft_label
from mmzsq.tasks.padded_task import PAD_MULTIPLE
from mmzsq.tasks.prediction_maps import flatten_maps


class DynamicTargets(NamedTuple):
    """Inputs of the loss that do not depend on predictions.

    Attributes:
        padded: Labels, padded to M >= 1 per image.
        priors: x, y, stride in x and stride in y of each location of all levels, in pixels, (P, 4).
    """

    padded: PaddedTargets
    priors: Tensor


def pad_labels(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> DynamicTargets:
    """Pad labels to a multiple of :data:`~mmzsq.tasks.padded_task.PAD_MULTIPLE` per image, to leave room for more.

    Args:
        head: The head, which defines the locations.
        labels: One entry per image, on the device, with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
        map_sizes: Rows and columns of the head's maps.
        image_size: Unused.
    """
    device = labels[0].bboxes.device
    longest = max(1, *(len(entry) for entry in labels))
    priors = head.prior_generator.grid_priors(map_sizes, device=device, with_stride=True)
    return DynamicTargets(pad_targets(labels, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE), torch.cat(priors))


def yolox_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: DynamicTargets) -> Tensor:
    """Loss of a ``YOLOXHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits, encoded boxes and objectness of every level, as returned by ``head``.
        targets: Return value of :func:`pad_labels`.

    Returns:
        A scalar.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    bboxes = head._bbox_decode(targets.priors, flatten_maps(maps[1], 4))
    objectness = flatten_maps(maps[2], 1)
    # Labels are assigned by the centers of the cells, although boxes are predicted relative to their corners.
    middles = torch.cat((targets.priors[:, :2] + targets.priors[:, 2:] * 0.5, targets.priors[:, 2:]), dim=1)
    with torch.no_grad():
        scores = (logits.sigmoid() * objectness.sigmoid()).sqrt()
    match = match_sim_ota(head.assigner, bboxes.detach(), scores, middles, targets.padded)

    gt_bboxes, gt_labels = matched_labels(match, targets.padded)
    wanted = one_hot(gt_labels, head.num_classes) * match.overlap[..., None]
    positive = match.positive[..., None]
    loss_cls = (elementwise_loss(head.loss_cls, logits, wanted) * positive).sum()
    loss_bbox = positive_box_loss(head.loss_bbox, bboxes, gt_bboxes, match.positive).sum()
    loss_obj = elementwise_loss(head.loss_obj, objectness, positive.float()).sum()
    return (loss_cls + loss_bbox + loss_obj) / match.positive.sum().clamp(min=1)


def rtmdet_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: DynamicTargets) -> Tensor:
    """Loss of an ``RTMDetHead``.

    Args:
        head: The head with its training configuration.
        maps: Class logits and distances in pixels of every level, as returned by ``head``.
        targets: Return value of :func:`pad_labels`.

    Returns:
        A scalar.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    bboxes = distance2bbox(targets.priors, flatten_maps(maps[1], 4))
    match = match_soft_label(head.assigner, bboxes.detach(), logits.detach(), targets.priors, targets.padded)

    gt_bboxes, gt_labels = matched_labels(match, targets.padded)
    wanted = one_hot(gt_labels, head.num_classes) * match.overlap[..., None]
    pos_weight = head.train_cfg['pos_weight']
    weights = match.positive * (pos_weight - 1 if pos_weight > 0 else 0) + 1
    loss_cls = (elementwise_loss(head.loss_cls, logits, wanted) * weights[..., None]).sum()
    loss_bbox = (positive_box_loss(head.loss_bbox, bboxes, gt_bboxes, match.positive) * match.overlap).sum()
    return (loss_cls + loss_bbox) / match.overlap.sum().clamp(min=1)


def matched_labels(match: Match, targets: PaddedTargets) -> tuple[Tensor, Tensor]:
    """Return the label that each location is matched to.

    Args:
        match: Matches of the N images and P locations.
        targets: The labels.

    Returns:
        Boxes (N, P, 4) and classes (N, P). Background locations get the first label of the image.
    """
    image = torch.arange(len(match.target), device=match.target.device)[:, None]
    return targets.bboxes[image, match.target], targets.labels[image, match.target]
