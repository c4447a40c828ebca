# SPDX-License-Identifier: Apache-2.0
"""Heads that assign labels by what they predict, in every step anew: YOLOX's and RTMDet's.

Each loss equals the head's ``loss_by_feat``, summed over its terms and levels, with masks in the place of selections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.structures.bbox import distance2bbox
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.tasks.elementwise_losses import box_errors, elementwise, one_hot
from mmzsq.tasks.one_stage.matching import Match, match_sim_ota, match_soft_label
from mmzsq.tasks.padded_task import PAD_MULTIPLE
from mmzsq.tasks.prediction_maps import flatten_maps


class DynamicTargets(NamedTuple):
    """What is known before a head has predicted anything.

    Attributes:
        padded: The labels, M an image, at least 1.
        priors: Of each place of all levels x, y and stride in x and in y, in pixels, (P, 4).
    """

    padded: PaddedTargets
    priors: Tensor


def pad_labels(
    head: Any, labels: Sequence[InstanceData], map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> DynamicTargets:
    """Pad labels, with room for more of them.

    Args:
        head: Tells where its places are.
        labels: One entry an image, on the device: ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,).
        map_sizes: Rows and columns of the head's maps.
        image_size: Not used.
    """
    device = labels[0].bboxes.device
    longest = max(1, *(len(entry) for entry in labels))
    priors = head.prior_generator.grid_priors(map_sizes, device=device, with_stride=True)
    return DynamicTargets(pad_targets(labels, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE), torch.cat(priors))


def yolox_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: DynamicTargets) -> Tensor:
    """Loss of a ``YOLOXHead``, a scalar.

    Args:
        head: With its training configuration.
        maps: Class logits, encoded boxes and objectness of every level, as ``head`` returns them.
        targets: The labels.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    bboxes = head._bbox_decode(targets.priors, flatten_maps(maps[1], 4))
    objectness = flatten_maps(maps[2], 1)
    # Places answer for labels by the middles of their cells, though boxes are predicted from the corners.
    middles = torch.cat((targets.priors[:, :2] + targets.priors[:, 2:] * 0.5, targets.priors[:, 2:]), dim=1)
    with torch.no_grad():
        scores = (logits.sigmoid() * objectness.sigmoid()).sqrt()
    match = match_sim_ota(head.assigner, bboxes.detach(), scores, middles, targets.padded)

    gt_bboxes, gt_labels = matched_labels(match, targets.padded)
    wanted = one_hot(gt_labels, head.num_classes) * match.overlap[..., None]
    positive = match.positive[..., None]
    loss_cls = (elementwise(head.loss_cls, logits, wanted) * positive).sum()
    loss_bbox = box_errors(head.loss_bbox, bboxes, gt_bboxes, match.positive).sum()
    loss_obj = elementwise(head.loss_obj, objectness, positive.float()).sum()
    return (loss_cls + loss_bbox + loss_obj) / match.positive.sum().clamp(min=1)


def rtmdet_loss(head: Any, maps: Sequence[Sequence[Tensor]], targets: DynamicTargets) -> Tensor:
    """Loss of an ``RTMDetHead``, a scalar.

    Args:
        head: With its training configuration.
        maps: Class logits and distances, in pixels, of every level, as ``head`` returns them.
        targets: The labels.
    """
    logits = flatten_maps(maps[0], head.num_classes)
    bboxes = distance2bbox(targets.priors, flatten_maps(maps[1], 4))
    match = match_soft_label(head.assigner, bboxes.detach(), logits.detach(), targets.priors, targets.padded)

    gt_bboxes, gt_labels = matched_labels(match, targets.padded)
    wanted = one_hot(gt_labels, head.num_classes) * match.overlap[..., None]
    pos_weight = head.train_cfg['pos_weight']
    weights = match.positive * (pos_weight - 1 if pos_weight > 0 else 0) + 1
    loss_cls = (elementwise(head.loss_cls, logits, wanted) * weights[..., None]).sum()
    loss_bbox = (box_errors(head.loss_bbox, bboxes, gt_bboxes, match.positive) * match.overlap).sum()
    return (loss_cls + loss_bbox) / match.overlap.sum().clamp(min=1)


def matched_labels(match: Match, targets: PaddedTargets) -> tuple[Tensor, Tensor]:
    """Box (N, P, 4) and class (N, P) of the label that each place answers for; of the first one for background."""
    image = torch.arange(len(match.target), device=match.target.device)[:, None]
    return targets.bboxes[image, match.target], targets.labels[image, match.target]
