# SPDX-License-Identifier: Apache-2.0
"""Dynamic-k matching of predictions to labels, for a whole batch.

SimOTA (Ge et al. 2021, arXiv:2107.08430, section 2.1) and the assignment of RTMDet (Lyu et al. 2022, arXiv:2212.07784,
section 3.3) follow the same procedure with two different costs. Each label is matched to its k cheapest locations,
where k is the sum of its best IoUs. A location matched to several labels keeps the one with the lowest cost.
MMDetection loops over images and labels. Here, all pairs of labels and locations are kept, with masks, so that shapes
depend only on the padded length and the host never waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from mmdet.models.task_modules.assigners.dynamic_soft_label_assigner import EPS as SOFT_LABEL_EPS
from mmdet.models.task_modules.assigners.sim_ota_assigner import EPS as SIM_OTA_EPS
from mmdet.models.task_modules.assigners.sim_ota_assigner import INF as SIM_OTA_INF
from torch import Tensor
from torch.nn import functional as F

from mmzsq.boxes import pairwise_iou
from mmzsq.models.padded_targets import PaddedTargets


class Match(NamedTuple):
    """Matches of P locations in each of N images.

    Attributes:
        target: Index of the matched label, (N, P), long; 0 for background.
        positive: Whether the location is matched to a label, (N, P), bool.
        overlap: IoU of the predicted box with the matched label, (N, P); 0 for background.
    """

    target: Tensor
    positive: Tensor
    overlap: Tensor


@torch.no_grad()
def match_sim_ota(assigner: Any, bboxes: Tensor, scores: Tensor, priors: Tensor, targets: PaddedTargets) -> Match:
    """Match with the rules of MMDetection's ``SimOTAAssigner``.

    Args:
        assigner: The assigner, which defines radius, weights and number of candidates.
        bboxes: Predicted boxes in xyxy pixels, (N, P, 4), float32.
        scores: Predicted class scores in [0, 1], (N, P, C), float32.
        priors: Center x, center y, stride in x and stride in y of each location, in pixels, (P, 4).
        targets: Labels, padded to M >= 1 per image.
    """
    points, strides = priors[:, :2], priors[:, 2:]
    in_box = _inside(points, targets.bboxes[:, :, None, :2], targets.bboxes[:, :, None, 2:])
    center = _centers(targets)
    in_center = _inside(points, center - assigner.center_radius * strides, center + assigner.center_radius * strides)
    candidate = ((in_box | in_center) & targets.valid[..., None]).any(1)

    overlap = pairwise_iou(targets.bboxes, bboxes)
    # Binary cross-entropy summed over classes: all classes as negatives, then the term of the label's class replaced.
    absent = -torch.log1p(-scores).clamp(min=-100)
    image = torch.arange(len(scores), device=scores.device)[:, None]
    present = -scores[image, :, targets.labels].log().clamp(min=-100)
    cost_cls = absent.sum(-1)[:, None] - absent[image, :, targets.labels] + present
    cost_iou = -torch.log(overlap + SIM_OTA_EPS)
    cost = cost_cls * assigner.cls_weight + cost_iou * assigner.iou_weight + ~(in_box & in_center) * SIM_OTA_INF
    return match_dynamic_k(cost, overlap, candidate, targets.valid, assigner.candidate_topk)


@torch.no_grad()
def match_soft_label(assigner: Any, bboxes: Tensor, logits: Tensor, priors: Tensor, targets: PaddedTargets) -> Match:
    """Match with the rules of MMDetection's ``DynamicSoftLabelAssigner``.

    Args:
        assigner: The assigner, which defines radius, weight and number of candidates.
        bboxes: Predicted boxes in xyxy pixels, (N, P, 4), float32.
        logits: Predicted class logits, (N, P, C), float32.
        priors: Center x, center y, stride in x and stride in y of each location, in pixels, (P, 4).
        targets: Labels, padded to M >= 1 per image.
    """
    points, strides = priors[:, :2], priors[:, 2]
    in_box = _inside(points, targets.bboxes[:, :, None, :2], targets.bboxes[:, :, None, 2:])
    candidate = (in_box & targets.valid[..., None]).any(1)

    overlap = pairwise_iou(targets.bboxes, bboxes)
    distance = (points - _centers(targets)).pow(2).sum(-1).sqrt() / strides
    # The soft label is the IoU for the label's class and 0 for all other classes. Their sum is shared by all labels.
    absent = F.softplus(logits) * logits.sigmoid().pow(2)
    image = torch.arange(len(logits), device=logits.device)[:, None]
    logit = logits[image, :, targets.labels]
    present = F.binary_cross_entropy_with_logits(logit, overlap, reduction='none') * (overlap - logit.sigmoid()).pow(2)
    cost_cls = absent.sum(-1)[:, None] - absent[image, :, targets.labels] + present
    cost_iou = -torch.log(overlap + SOFT_LABEL_EPS) * assigner.iou_weight
    cost = cost_cls + cost_iou + torch.pow(10, distance - assigner.soft_center_radius)
    return match_dynamic_k(cost, overlap, candidate, targets.valid, assigner.topk)


def match_dynamic_k(cost: Tensor, overlap: Tensor, candidate: Tensor, valid: Tensor, topk: int) -> Match:
    """Match each label to its k cheapest locations.

    k is the sum of the label's ``topk`` best IoUs, rounded down, but at least 1. A location matched to several labels
    keeps the one with the lowest cost.

    Args:
        cost: Cost of each location for each label, (N, M, P).
        overlap: IoU of each predicted box with each label, in [0, 1], (N, M, P).
        candidate: Locations that may be matched, (N, P), bool.
        valid: Labels that are not padding, (N, M), bool.
        topk: Maximum number of locations per label.

    Example:
        >>> cost = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]]])
        >>> overlap = torch.tensor([[[0.9, 0.8, 0.5], [0.6, 0.0, 0.0]]])
        >>> all_locations = torch.ones(1, 3, dtype=torch.bool)
        >>> match_dynamic_k(cost, overlap, all_locations, torch.ones(1, 2, dtype=torch.bool), 3).positive
        tensor([[ True,  True, False]])
    """
    eligible = candidate[:, None] & valid[..., None]
    topk = min(topk, cost.shape[-1])
    count = torch.where(eligible, overlap, 0).topk(topk).values.sum(-1).int().clamp(min=1)
    # An overflowing cost is clamped to the largest finite value, below the infinite cost of ineligible locations.
    cost = torch.where(eligible, cost.clamp(max=torch.finfo(cost.dtype).max), torch.inf)
    cheapest = cost.topk(topk, largest=False)
    # Selected by rank, not by a threshold, so that ties in cost never add locations beyond k.
    taken = (torch.arange(topk, device=cost.device) < count[..., None]) & cheapest.values.isfinite()
    matched = torch.zeros_like(eligible).scatter(2, cheapest.indices, taken)
    contested = matched.sum(1, keepdim=True) > 1
    index = torch.arange(cost.shape[1], device=cost.device)[:, None]
    matched = torch.where(contested, cost.argmin(1, keepdim=True) == index, matched)
    return Match(matched.int().argmax(1), matched.any(1), torch.where(matched, overlap, 0).sum(1))


def _inside(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a mask (N, M, P) of the points (P, 2) that lie between two corners (N, M, P or 1, 2)."""
    return ((points > low) & (points < high)).all(-1)


def _centers(targets: PaddedTargets) -> Tensor:
    """Return the centers of the labels, (N, M, 1, 2)."""
    return ((targets.bboxes[..., :2] + targets.bboxes[..., 2:]) / 2)[:, :, None]
