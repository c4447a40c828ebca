# SPDX-License-Identifier: Apache-2.0
"""Which places answer for which label where that depends on what they predict: dynamic-k matching of a whole batch.

SimOTA (Ge et al. 2021, arXiv:2107.08430, section 2.1) and the assignment of RTMDet (Lyu et al. 2022, arXiv:2212.07784,
section 3.3) are one procedure with two costs: a label is answered for by as many of the cheapest places as the best
IoUs with it sum up to, and a place that several labels want answers for the one it costs least. MMDetection runs it
image by image and label by label. Here all pairs of labels and places are kept, with masks, so that shapes depend on
nothing but the padded length and no step waits for the device.
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
    """What each of P places answers for in each of N images.

    Attributes:
        target: Index of the label, (N, P), long; 0 for background.
        positive: Answers for one, (N, P), bool.
        overlap: IoU of its box with that label, (N, P); 0 for background.
    """

    target: Tensor
    positive: Tensor
    overlap: Tensor


@torch.no_grad()
def match_sim_ota(assigner: Any, bboxes: Tensor, scores: Tensor, priors: Tensor, targets: PaddedTargets) -> Match:
    """Match as MMDetection's ``SimOTAAssigner`` does.

    Args:
        assigner: Tells the radius, weights and number of candidates.
        bboxes: Predicted boxes, xyxy in pixels, (N, P, 4), float32.
        scores: Predicted score of each class, in [0, 1], (N, P, C), float32.
        priors: Center of each place, x and y in pixels, and its strides, likewise; (P, 4).
        targets: The labels, M an image, at least 1.
    """
    points, strides = priors[:, :2], priors[:, 2:]
    in_box = _inside(points, targets.bboxes[:, :, None, :2], targets.bboxes[:, :, None, 2:])
    center = _centers(targets)
    in_center = _inside(points, center - assigner.center_radius * strides, center + assigner.center_radius * strides)
    candidate = ((in_box | in_center) & targets.valid[..., None]).any(1)

    overlap = pairwise_iou(targets.bboxes, bboxes)
    # Binary cross-entropy summed over classes: every class is a negative, but the label's, whose term is replaced.
    absent = -torch.log1p(-scores).clamp(min=-100)
    image = torch.arange(len(scores), device=scores.device)[:, None]
    present = -scores[image, :, targets.labels].log().clamp(min=-100)
    cost_cls = absent.sum(-1)[:, None] - absent[image, :, targets.labels] + present
    cost_iou = -torch.log(overlap + SIM_OTA_EPS)
    cost = cost_cls * assigner.cls_weight + cost_iou * assigner.iou_weight + ~(in_box & in_center) * SIM_OTA_INF
    return match_dynamic_k(cost, overlap, candidate, targets.valid, assigner.candidate_topk)


@torch.no_grad()
def match_soft_label(assigner: Any, bboxes: Tensor, logits: Tensor, priors: Tensor, targets: PaddedTargets) -> Match:
    """Match as MMDetection's ``DynamicSoftLabelAssigner`` does.

    Args:
        assigner: Tells the radius, weight and number of candidates.
        bboxes: Predicted boxes, xyxy in pixels, (N, P, 4), float32.
        logits: Predicted logit of each class, (N, P, C), float32.
        priors: Center of each place, x and y in pixels, and its strides, likewise; (P, 4).
        targets: The labels, M an image, at least 1.
    """
    points, strides = priors[:, :2], priors[:, 2]
    in_box = _inside(points, targets.bboxes[:, :, None, :2], targets.bboxes[:, :, None, 2:])
    candidate = (in_box & targets.valid[..., None]).any(1)

    overlap = pairwise_iou(targets.bboxes, bboxes)
    distance = (points - _centers(targets)).pow(2).sum(-1).sqrt() / strides
    # The soft label is the IoU for the label's class and 0 for all others, which are summed once for all labels.
    absent = F.softplus(logits) * logits.sigmoid().pow(2)
    image = torch.arange(len(logits), device=logits.device)[:, None]
    logit = logits[image, :, targets.labels]
    present = F.binary_cross_entropy_with_logits(logit, overlap, reduction='none') * (overlap - logit.sigmoid()).pow(2)
    cost_cls = absent.sum(-1)[:, None] - absent[image, :, targets.labels] + present
    cost_iou = -torch.log(overlap + SOFT_LABEL_EPS) * assigner.iou_weight
    cost = cost_cls + cost_iou + torch.pow(10, distance - assigner.soft_center_radius)
    return match_dynamic_k(cost, overlap, candidate, targets.valid, assigner.topk)


def match_dynamic_k(cost: Tensor, overlap: Tensor, candidate: Tensor, valid: Tensor, topk: int) -> Match:
    """Give each label its cheapest places: as many as its ``topk`` best IoUs sum up to, rounded down, at least one.

    Args:
        cost: Of each place for each label, (N, M, P).
        overlap: IoU of what the place predicts with the label, in [0, 1], (N, M, P).
        candidate: Places that may answer for a label, (N, P), bool.
        valid: Labels that are no padding, (N, M), bool.
        topk: Most places of a label.

    Example:
        >>> cost = torch.tensor([[[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]]])
        >>> overlap = torch.tensor([[[0.9, 0.8, 0.5], [0.6, 0.0, 0.0]]])
        >>> all_places = torch.ones(1, 3, dtype=torch.bool)
        >>> match_dynamic_k(cost, overlap, all_places, torch.ones(1, 2, dtype=torch.bool), 3).positive
        tensor([[ True,  True, False]])
    """
    eligible = candidate[:, None] & valid[..., None]
    topk = min(topk, cost.shape[-1])
    count = torch.where(eligible, overlap, 0).topk(topk).values.sum(-1).int().clamp(min=1)
    # A cost that overflows is the greatest, and still less than that of a place that may not answer.
    cost = torch.where(eligible, cost.clamp(max=torch.finfo(cost.dtype).max), torch.inf)
    cheapest = cost.topk(topk, largest=False)
    # By rank, not by threshold: of equal costs no more are taken than there are to be.
    taken = (torch.arange(topk, device=cost.device) < count[..., None]) & cheapest.values.isfinite()
    matched = torch.zeros_like(eligible).scatter(2, cheapest.indices, taken)
    contested = matched.sum(1, keepdim=True) > 1
    index = torch.arange(cost.shape[1], device=cost.device)[:, None]
    matched = torch.where(contested, cost.argmin(1, keepdim=True) == index, matched)
    return Match(matched.int().argmax(1), matched.any(1), torch.where(matched, overlap, 0).sum(1))


def _inside(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which points (P, 2) lie between corners (N, M, P or 1, 2): (N, M, P), bool."""
    return ((points > low) & (points < high)).all(-1)


def _centers(targets: PaddedTargets) -> Tensor:
    """Centers of the labels, (N, M, 1, 2)."""
    return ((targets.bboxes[..., :2] + targets.bboxes[..., 2:]) / 2)[:, :, None]
