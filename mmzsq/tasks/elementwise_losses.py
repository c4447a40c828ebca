# SPDX-License-Identifier: Apache-2.0
"""Losses of MMDetection's heads without reduction, for all locations at once.

MMDetection's heads first select the locations that are matched to a label, so that shapes depend on values. Here every
loss is computed for all locations, and locations that do not count get a weight of 0. If MMDetection's loss module can
compute this, it is called. Some modules copy small constants from the host or select locations themselves; for these,
the same function is computed from the module's settings.
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
"""Losses of logits that :func:`elementwise_loss` supports, provided that they use a sigmoid."""
IOU_LOSSES = (IoULoss, GIoULoss, DIoULoss, CIoULoss)
"""Losses of decoded boxes that :func:`elementwise_loss` supports."""
L1_LOSSES = (L1Loss, SmoothL1Loss)
"""Losses of encoded boxes (offsets) that :func:`elementwise_loss` supports."""


def elementwise_loss(loss: nn.Module, predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute a loss without reduction, scaled by its ``loss_weight``.

    Args:
        loss: A loss of a class in :data:`SCORE_LOSSES`, :data:`IOU_LOSSES` or :data:`L1_LOSSES`.
        predictions: Logits (..., C), boxes in xyxy format (..., 4), or offsets (..., 4).
        targets: Targets of the same shape; in [0, 1] for logits.

    Returns:
        Shape (..., C) for logits, (...) for boxes, (..., 4) for offsets.
    """
    if isinstance(loss, IoULoss):
        return loss.loss_weight * iou_loss(predictions, targets, 'linear' if loss.linear else loss.mode, loss.eps)
    if isinstance(loss, GIoULoss):
        return loss.loss_weight * giou_loss(predictions, targets, loss.eps)
    if isinstance(loss, QualityFocalLoss):
        return loss.loss_weight * quality_focal_loss(predictions, targets, loss.beta)
    flat = predictions.flatten(0, -2), targets.flatten(0, -2)
    return loss(*flat, reduction_override='none').unflatten(0, predictions.shape[:-1])


def unweighted_l1_loss(loss: nn.Module, predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute ``L1Loss`` or ``SmoothL1Loss`` with PyTorch's kernel, without reduction and without ``loss_weight``.

    It is separate from :func:`elementwise_loss`, which calls MMDetection's module: their gradients of SmoothL1 differ
    in the last bit, and two-stage losses apply ``loss_weight`` after the sum.

    Args:
        loss: A loss of a class in :data:`L1_LOSSES`.
        predictions: Any shape.
        targets: The same shape.

    Returns:
        The same shape.
    """
    if isinstance(loss, SmoothL1Loss):
        return F.smooth_l1_loss(predictions, targets, reduction='none', beta=loss.beta)
    return F.l1_loss(predictions, targets, reduction='none')


def positive_box_loss(loss: nn.Module, bboxes: Tensor, targets: Tensor, positive: Tensor) -> Tensor:
    """Box loss of the positive locations without reduction; 0 for all others, which also get no gradient.

    Args:
        loss: A loss of a class in :data:`IOU_LOSSES`.
        bboxes: Predicted boxes in xyxy format, (N, P, 4).
        targets: Target boxes in the same unit, (N, P, 4); arbitrary where ``positive`` is False.
        positive: Locations matched to a label, (N, P), bool.

    Returns:
        Shape (N, P).
    """
    # Masked before and after: the loss can be NaN for equal boxes (CIoU) and for non-finite predictions.
    errors = elementwise_loss(loss, torch.where(positive[..., None], bboxes, targets), targets)
    return torch.where(positive, errors, 0)


def iou_loss(bboxes: Tensor, targets: Tensor, mode: str, eps: float) -> Tensor:
    """IoU loss of paired boxes.

    Args:
        bboxes: Boxes in xyxy format, (..., 4).
        targets: Boxes in the same unit, (..., 4).
        mode: ``'linear'`` (1 - IoU), ``'square'`` (1 - IoU^2) or ``'log'`` (-log IoU).
        eps: Lower bound of the IoU.

    Returns:
        Shape (...).
    """
    iou = paired_iou(bboxes, targets).clamp(min=eps)
    if mode == 'log':
        return -iou.log()
    return 1 - (iou if mode == 'linear' else iou**2)


def giou_loss(bboxes: Tensor, targets: Tensor, eps: float) -> Tensor:
    """GIoU loss of paired boxes: 1 - generalized IoU (Rezatofighi et al. 2019, arXiv:1902.09630).

    Args:
        bboxes: Boxes in xyxy format, (..., 4).
        targets: Boxes in the same unit, (..., 4).
        eps: Lower bound of areas in denominators.

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
    """Binary cross-entropy scaled by the error of the score (Li et al. 2020, arXiv:2006.04388, equation 5).

    Args:
        logits: Any shape.
        scores: Target scores in [0, 1], the same shape; 0 for all classes but that of the label.
        beta: Exponent of the absolute error of the score.

    Returns:
        The same shape.
    """
    errors = F.binary_cross_entropy_with_logits(logits, scores, reduction='none')
    return errors * (scores - logits.sigmoid()).abs().pow(beta)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot encode ``labels`` (...) as float32 (..., num_classes); labels out of range give all zeros.

    Unlike ``torch.nn.functional.one_hot``, this never checks values on the host.

    Example:
        >>> one_hot(torch.tensor([1, 2]), 2)
        tensor([[0., 1.],
                [0., 0.]])
    """
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).float()
