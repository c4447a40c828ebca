# SPDX-License-Identifier: Apache-2.0
"""Distillation of transformers query by query: categories, and boxes or masks, of each decoder layer.

A query of the student is compared with the query of the same index of the teacher. :mod:`mmzsq.qat.paired_forward`
makes both detectors select the same queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.models.detectors import DetectionTransformer, MaskFormer
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from mmzsq.boxes import box_area, overlap_and_union
from mmzsq.distillation.base import Outputs, WeightedTermsLoss
from mmzsq.distillation.divergence import binary_kl, kl_divergence, soft_object_count
from mmzsq.distillation.locations import spread_error
from mmzsq.distillation.prediction_kl import query_proposal_branches
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

QUERY_HEAD = 'bbox_head'
MASK_QUERY_HEAD = 'panoptic_head'
"""Attribute of MaskFormer and Mask2Former with the head whose queries predict masks."""


def generalized_iou(bboxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalized IoU of paired boxes (Rezatofighi et al. 2019, arXiv:1902.09630).

    Args:
        bboxes: Boxes xyxy, (..., 4).
        targets: Boxes in the same unit, (..., 4).
        eps: Smallest denominator.

    Returns:
        Shape (...), in (-1, 1].

    Example:
        >>> generalized_iou(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 1.0]))
        tensor(0.)
    """
    overlap, union = overlap_and_union(bboxes, targets)
    hull = box_area(
        torch.cat(
            (torch.minimum(bboxes[..., :2], targets[..., :2]), torch.maximum(bboxes[..., 2:], targets[..., 2:])), -1
        )
    )
    return overlap / union.clamp(min=eps) - (hull - union) / hull.clamp(min=eps)


def query_scores(classes: Tensor, softmax: bool) -> Tensor:
    """Return the score of the likeliest category of each query, (N, Q).

    Args:
        classes: Class logits (N, Q, C); with a softmax, the last one is the background.
        softmax: Whether classes are a softmax.
    """
    return classes.softmax(-1)[..., :-1].amax(-1) if softmax else classes.amax(-1).sigmoid()


def class_divergence(student: Tensor, teacher: Tensor, softmax: bool, total: Tensor) -> Tensor:
    """Divergence of the categories of all queries, divided by the soft number of objects; a scalar.

    Args:
        student: Class logits of the student, (N, Q, C).
        teacher: Class logits of the teacher, (N, Q, C).
        softmax: Whether classes are a softmax with the background last, or independent.
        total: Soft number of objects.
    """
    divergence = kl_divergence(student, teacher, 1.0) if softmax else binary_kl(student, teacher)
    return divergence.sum() / total


def query_terms(student: Sequence[Tensor], teacher: Sequence[Tensor], softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences of one decoder layer.

    Args:
        student: Class logits (N, Q, C), and boxes (N, Q, 4), cxcywh as fractions of the image.
        teacher: The same of the teacher, without gradient.
        softmax: Whether classes are a softmax with the background last.

    Returns:
        The divergence of categories of all queries; the L1 distance of boxes, and 1 - GIoU, both weighted by the
        teacher's score. All are divided by the sum of these scores, the soft number of objects.
    """
    (classes_S, bboxes_S), (classes_T, bboxes_T) = student, teacher
    weight = query_scores(classes_T, softmax)
    total = soft_object_count(weight)
    distance = (bboxes_S - bboxes_T).abs().sum(-1)
    apart = 1 - generalized_iou(bbox_cxcywh_to_xyxy(bboxes_S), bbox_cxcywh_to_xyxy(bboxes_T))
    classes = class_divergence(classes_S, classes_T, softmax, total)
    return classes, (weight * distance).sum() / total, (weight * apart).sum() / total


def queries_unsupported_reason(detector: nn.Module) -> str | None:
    """Return why the queries of ``detector`` cannot be compared, or None if they can.

    Args:
        detector: Any detector.

    Returns:
        The reason, a clause for a message.
    """
    name = type(detector).__name__
    if not isinstance(detector, DetectionTransformer):
        return f'{name} is not a DetectionTransformer'
    head = getattr(detector, QUERY_HEAD, None)
    if not isinstance(head, DETRHead):
        return f'its {QUERY_HEAD}, {type(head).__name__}, is not a DETRHead'
    return None


@MODELS.register_module()
class QueryPredictionLoss(WeightedTermsLoss):
    """Divergences of the categories and boxes of each query, averaged over the decoder layers; see :func:`query_terms`.

    If a transformer selects its queries among proposals of the encoder, the proposals are one more layer. Their boxes
    are compared before decoding, in units of the teacher's spread. The default weights are those of DETR's loss
    (Carion et al. 2020, arXiv:2005.12872).

    Args:
        loss_weight: Factor of the whole loss.
        class_weight: Factor of the category term.
        l1_weight: Factor of the L1 distance of boxes.
        iou_weight: Factor of 1 - GIoU.

    Raises:
        UserError: From :meth:`taps`, if the detector has no such queries.
    """

    def __init__(
        self, loss_weight: float = 1.0, class_weight: float = 1.0, l1_weight: float = 5.0, iou_weight: float = 2.0
    ) -> None:
        super().__init__(loss_weight, classes=class_weight, l1=l1_weight, iou=iou_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the head, and of the branches that propose queries, if there are any.

        Raises:
            UserError: If the detector has no such queries.
        """
        reason = queries_unsupported_reason(detector)
        if reason is not None:
            raise UserError(
                f"QueryPredictionLoss does not support this detector: {reason}. Use dict(type='mmzsq.PredictionLoss') "
                'in zsq.distillation.losses, which chooses a supported loss'
            )
        return [QUERY_HEAD, *query_proposal_branches(detector)]

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Class logits (N, Q, C) of all decoder layers, then boxes (N, Q, 4) of all layers, by the name of
                the head; outputs (N, S, C) and (N, S, 4) of the branches that propose queries.
            teacher: The same of the teacher, without gradient.
            detector: The student.
        """
        softmax = not detector.bbox_head.loss_cls.use_sigmoid
        with torch.autocast(teacher[QUERY_HEAD][0].device.type, enabled=False):
            layers_S, layers_T = (_layers(outputs[QUERY_HEAD]) for outputs in (student, teacher))
            layers = [query_terms(s, t, softmax) for s, t in zip(layers_S, layers_T, strict=True)]
            classes, distances, apart = (torch.stack(terms) for terms in zip(*layers, strict=True))
            weights = self.weights
            total = weights['classes'] * classes + weights['l1'] * distances + weights['iou'] * apart
            branches = query_proposal_branches(detector)
            if branches:
                (classes_S, boxes_S), (classes_T, boxes_T) = (
                    [outputs[name][0].float() for name in branches] for outputs in (student, teacher)
                )
                scores = query_scores(classes_T, softmax)
                count = soft_object_count(scores)
                proposals = weights['classes'] * class_divergence(classes_S, classes_T, softmax, count)
                proposals = proposals + weights['iou'] * spread_error(boxes_S, boxes_T, scores, count)
                total = torch.cat([total, proposals[None]])
            return self.loss_weight * total.mean()


def _layers(outputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair the class logits and the boxes of each decoder layer."""
    count = len(outputs) // 2
    return [(classes.float(), boxes.float()) for classes, boxes in zip(outputs[:count], outputs[count:], strict=True)]


def mask_distances(masks: Tensor, target_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of paired masks: the pixel-wise divergence, and the Dice distance of their probabilities.

    Args:
        masks: Mask logits of the student, (..., H, W).
        target_masks: Mask logits of the teacher, of the same shape.

    Returns:
        The mean KL divergence of the pixels; and ``1 - (2 sum(st) + 1) / (sum(s^2) + sum(t^2) + 1)`` of the
        probabilities s and t (V-Net, Milletari et al. 2016, arXiv:1606.04797), which is 0 for equal masks, unlike the
        naive form with ``sum(s) + sum(t)``. Both have shape (...).

    Example:
        >>> bce, dice = mask_distances(torch.full((1, 2, 2), 9.0), torch.full((1, 2, 2), 9.0))
        >>> float(bce), float(dice)
        (0.0, 0.0)
    """
    pixels = binary_kl(masks, target_masks).flatten(-2).mean(-1)
    prob, target = masks.sigmoid().flatten(-2), target_masks.sigmoid().flatten(-2)
    overlap = (prob * target).sum(-1)
    total = prob.square().sum(-1) + target.square().sum(-1)
    return pixels, 1 - (2 * overlap + 1) / (total + 1)


def mask_query_terms(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences of one decoder layer whose queries predict masks.

    Args:
        student: Class logits (N, Q, C + 1), with the background last, and mask logits (N, Q, H, W).
        teacher: The same of the teacher, without gradient.

    Returns:
        The divergence of categories of all queries; the pixel-wise divergence and the Dice distance of masks
        (:func:`mask_distances`), both weighted by the teacher's score. All are divided by the sum of these scores.
    """
    (classes_S, masks_S), (classes_T, masks_T) = student, teacher
    weight = query_scores(classes_T, softmax=True)
    total = soft_object_count(weight)
    pixels, apart = mask_distances(masks_S, masks_T)
    classes = class_divergence(classes_S, classes_T, True, total)
    return classes, (weight * pixels).sum() / total, (weight * apart).sum() / total


@MODELS.register_module()
class MaskQueryPredictionLoss(WeightedTermsLoss):
    """Divergences of the categories and masks of each query of MaskFormer or Mask2Former, averaged over the layers.

    See :func:`mask_query_terms`. The default weights are those of Mask2Former's loss (Cheng et al. 2022,
    arXiv:2112.01527), divided by that of its categories.

    Args:
        loss_weight: Factor of the whole loss.
        class_weight: Factor of the category term.
        mask_weight: Factor of the pixel-wise divergence of masks.
        dice_weight: Factor of the Dice distance of masks.

    Raises:
        UserError: From :meth:`taps`, if the queries of the detector predict no masks.
    """

    def __init__(
        self, loss_weight: float = 1.0, class_weight: float = 1.0, mask_weight: float = 2.5, dice_weight: float = 2.5
    ) -> None:
        super().__init__(loss_weight, classes=class_weight, masks=mask_weight, dice=dice_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the name of the head.

        Raises:
            UserError: If the queries of the detector predict no masks.
        """
        if not isinstance(detector, MaskFormer):
            raise UserError(
                f'MaskQueryPredictionLoss does not support this detector: {type(detector).__name__} is not a '
                "MaskFormer. Use dict(type='mmzsq.PredictionLoss') in zsq.distillation.losses, which chooses a "
                'supported loss'
            )
        return [MASK_QUERY_HEAD]

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: By the name of the head, class logits (N, Q, C + 1) of all decoder layers, then mask logits
                (N, Q, H, W) of all layers; or both stacked, (L, N, Q, C + 1) and (L, N, Q, H, W), as MaskFormer does.
            teacher: The same of the teacher, without gradient.
            detector: The student.
        """
        with torch.autocast(teacher[MASK_QUERY_HEAD][0].device.type, enabled=False):
            layers_S, layers_T = (_layers(unstacked(outputs[MASK_QUERY_HEAD])) for outputs in (student, teacher))
            layers = [mask_query_terms(s, t) for s, t in zip(layers_S, layers_T, strict=True)]
            classes, pixels, apart = (torch.stack(terms).mean() for terms in zip(*layers, strict=True))
            weights = self.weights
            total = weights['classes'] * classes + weights['masks'] * pixels + weights['dice'] * apart
            return self.loss_weight * total


def unstacked(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return class logits of each layer, then mask logits of each layer, whether they are stacked or not."""
    if len(outputs) == 2 and outputs[0].dim() == 4:
        return [layer for stacked in outputs for layer in stacked.unbind()]
    return list(outputs)
