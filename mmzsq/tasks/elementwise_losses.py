# SPDX-License-Identifier: Apache-2.0
"""Losses of MMDetection's heads before they are weighed and averaged, over all places at once.

Heads pick the places that answer for a label first, so that shapes depend on values. Here a loss runs over all places,
and those that do not count weigh 0. Where a module computes that, it is called. Some read small constants from the
host's memory or pick places once more; of these the same function is computed from the module's settings.
"""

from __future__ import annotations

import torch
from mmdet.models.losses import (
    CIoULoss,
    CrossEntropyLoss,
    DIoULoss,
    GIoULoss,
    IoULoss,
    L1Loss,
    QualityFocalLoss,
    SmoothL1Loss,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.boxes import overlap_and_union, paired_iou

SCORE_LOSSES = (CrossEntropyLoss, QualityFocalLoss)
"""Losses of logits that :func:`elementwise` computes, if they take the sigmoid of each."""
BOX_LOSSES = (IoULoss, GIoULoss, DIoULoss, CIoULoss)
"""Losses of decoded boxes that :func:`elementwise` computes."""
OFFSET_LOSSES = (L1Loss, SmoothL1Loss)
"""Losses of encoded boxes that :func:`elementwise` computes."""


def elementwise(loss: nn.Module, predictions: Tensor, targets: Tensor) -> Tensor:
    """What ``loss`` computes before it weighs and averages, times its own weight.

    Args:
        loss: Of a class in :data:`SCORE_LOSSES`, :data:`BOX_LOSSES` or :data:`OFFSET_LOSSES`.
        predictions: Logits, (..., C); boxes, xyxy, or offsets, (..., 4).
        targets: As much; those of logits in [0, 1].

    Returns:
        (..., C) for logits, (...) for boxes, (..., 4) for offsets.
    """
    if isinstance(loss, IoULoss):
        return loss.loss_weight * iou_loss(predictions, targets, 'linear' if loss.linear else loss.mode, loss.eps)
    if isinstance(loss, GIoULoss):
        return loss.loss_weight * giou_loss(predictions, targets, loss.eps)
    if isinstance(loss, QualityFocalLoss):
        return loss.loss_weight * quality_focal_loss(predictions, targets, loss.beta)
    flat = predictions.flatten(0, -2), targets.flatten(0, -2)
    return loss(*flat, reduction_override='none').unflatten(0, predictions.shape[:-1])


def box_errors(loss: nn.Module, bboxes: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """:func:`elementwise` where a place answers for a label, else 0; nothing of the others reaches the gradient.

    Args:
        loss: Of a class in :data:`BOX_LOSSES`.
        bboxes: Predicted boxes, xyxy, (N, P, 4).
        targets: In the same unit, (N, P, 4); anything where ``positive`` is False.
        positive: Places that answer for a label, (N, P), bool.

    Returns:
        Shape (N, P).
    """
    # Twice: the loss of equal boxes may be no number (CIoU), as may that of boxes without bounds.
    errors = elementwise(loss, torch.where(positive[..., None], bboxes, targets), targets)
    return torch.where(positive, errors, 0)


def iou_loss(bboxes: Tensor, targets: Tensor, mode: str, eps: float) -> Tensor:
    """One less the IoU of paired boxes, or less its square, or minus its logarithm.

    Args:
        bboxes: xyxy, (..., 4).
        targets: In the same unit, (..., 4).
        mode: ``'linear'``, ``'square'`` or ``'log'``.
        eps: Least IoU.

    Returns:
        Shape (...).
    """
    iou = paired_iou(bboxes, targets).clamp(min=eps)
    if mode == 'log':
        return -iou.log()
    return 1 - (iou if mode == 'linear' else iou**2)


def giou_loss(bboxes: Tensor, targets: Tensor, eps: float) -> Tensor:
    """One less the generalized IoU of paired boxes (Rezatofighi et al. 2019, arXiv:1902.09630).

    Args:
        bboxes: xyxy, (..., 4).
        targets: In the same unit, (..., 4).
        eps: Least area.

    Returns:
        Shape (...), in [0, 2].
    """
    overlap, union = overlap_and_union(bboxes, targets)
    union = union.clamp(min=eps)
    low = torch.minimum(bboxes[..., :2], targets[..., :2])
    high = torch.maximum(bboxes[..., 2:], targets[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    hull = (width * height).clamp(min=eps)
    return 1 - overlap / union + (hull - union) / hull


def quality_focal_loss(logits: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Binary cross-entropy, scaled by how far a score is off (Li et al. 2020, arXiv:2006.04388, equation 5).

    Args:
        logits: Any shape.
        scores: What their sigmoid should be, in [0, 1], the same shape; 0 for all classes but the label's.
        beta: Exponent of the distance.
    """
    errors = F.binary_cross_entropy_with_logits(logits, scores, reduction='none')
    return errors * (scores - logits.sigmoid()).abs().pow(beta)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """1 for the class of each of ``labels`` (...), else 0: (..., num_classes), float32."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()
