# SPDX-License-Identifier: Apache-2.0
"""Distillation of two-stage detectors: maps of the proposal network, and outputs of the RoI heads.

The RoI heads of teacher and student both see the teacher's proposals, because outputs for different regions cannot be
compared. :mod:`mmzsq.qat.paired_forward` runs both detectors on them. The loss supports any ``TwoStageDetector`` of
MMDetection with standard heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmzsq.boxes import complete_iou, select_category
from mmzsq.distillation.base import Outputs, WeightedTermsLoss
from mmzsq.distillation.dense import DensePredictions, dense_terms
from mmzsq.distillation.divergence import binary_kl, kl_divergence, soft_object_count
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

RPN_HEAD = 'rpn_head'
ROI_BOX_HEAD = 'roi_head.bbox_head'
ROI_MASK_HEAD = 'roi_head.mask_head'

STANDARD_PARTS = ('bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head', 'shared_head')
"""Children of a ``StandardRoIHead``."""

MASK_ROI_INDICES = 'mask_roi_indices'
"""Extra entry of the teacher's outputs: indices of the box head's RoIs that the mask head saw, (M,), int64."""


class Foreground(NamedTuple):
    """The likeliest foreground category of each of R RoIs.

    Attributes:
        scores: Probability of that category, (R,).
        labels: Index of that category, (R,), int64.
    """

    scores: Tensor
    labels: Tensor


def foreground(class_logits: Tensor) -> Foreground:
    """Return the likeliest foreground category of each RoI.

    Args:
        class_logits: Logits (R, C + 1), the background last.
    """
    return Foreground(*class_logits.float().softmax(-1)[:, :-1].max(-1))


def most_confident_indices(scores: Tensor, counts: Sequence[int], limit: int) -> Tensor:
    """Return the indices of the RoIs with the highest scores of each image.

    Args:
        scores: Scores of all RoIs, image after image, (R,).
        counts: Number of RoIs of each image; the sum is R.
        limit: Maximum number of RoIs per image.

    Returns:
        Indices into ``scores``, int64; images in order, highest score first.

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.8])
        >>> most_confident_indices(scores, counts=[3, 2], limit=2)
        tensor([1, 2, 4, 3])
    """
    starts = [sum(counts[:image]) for image in range(len(counts))]
    parts = zip(starts, scores.split(list(counts)), strict=True)
    return torch.cat([start + part.topk(min(limit, len(part))).indices for start, part in parts])


def decode_on_unit_box(coder: Any, deltas: Tensor) -> Tensor:
    """Decode box deltas in the frame of their anchor or RoI, in which it is the unit square.

    Two boxes that are relative to the same anchor have the same IoU in this frame as in the image.

    Args:
        coder: The head's box coder, of MMDetection.
        deltas: Shape (..., 4).

    Returns:
        Boxes, xyxy, not clipped, (..., 4).
    """
    flat = deltas.reshape(-1, 4)
    unit = torch.zeros_like(flat)
    unit[:, 2:] = 1
    return get_box_tensor(coder.decode(unit, flat)).view(deltas.shape)


def rpn_predictions(maps: Sequence[Tensor], coder: Any) -> DensePredictions:
    """Decode the maps of an ``RPNHead`` with sigmoid scores.

    Args:
        maps: Objectness logits (N, A, H, W) of every level, then box deltas (N, 4A, H, W) of every level.
        coder: Box coder of the head.

    Returns:
        Predictions with one location per anchor, boxes in the frame of their anchors, and no categories (C = 0).
    """
    levels = len(maps) // 2
    rows = [m.float().permute(0, 2, 3, 1).flatten(1) for m in maps]
    objectness = torch.cat(rows[:levels], 1)
    deltas = torch.cat(rows[levels:], 1).unflatten(1, (-1, 4))
    return DensePredictions(decode_on_unit_box(coder, deltas), objectness, objectness.new_zeros(*objectness.shape, 0))


def box_head_terms(student: Sequence[Tensor], teacher: Sequence[Tensor], coder: Any) -> tuple[Tensor, Tensor]:
    """Divergences of categories and of boxes over R RoIs.

    Categories, including the background, are compared in every RoI (KL of the softmax). Boxes (1 - CIoU for the
    teacher's likeliest category) are weighted by the probability of that category. Both terms are divided by the sum
    of these probabilities over the batch, the soft number of RoIs with an object.

    Args:
        student: Class logits (R, C + 1), the background last, and box deltas (R, 4C) or (R, 4). Heads without box
            regression return class logits only; the box term is 0 then.
        teacher: Outputs of the teacher for the same RoIs, the same shapes, without gradient.
        coder: Box coder of the head.

    Returns:
        The divergences of categories and of boxes, scalars.
    """
    scores, labels = foreground(teacher[0])
    total = soft_object_count(scores)
    classes = kl_divergence(student[0], teacher[0], tau=1.0).sum() / total
    if len(teacher) == 1:
        return classes, torch.zeros_like(classes)
    bboxes_S, bboxes_T = (
        decode_on_unit_box(coder, select_category(deltas.float().unflatten(1, (-1, 4)), labels))
        for deltas in (student[1], teacher[1])
    )
    return classes, (scores * (1 - complete_iou(bboxes_S, bboxes_T))).sum() / total


def mask_term(student: Tensor, teacher: Tensor, found: Foreground) -> Tensor:
    """Divergence of masks: binary KL averaged over pixels, weighted over RoIs by the teacher's scores; a scalar.

    The weighted sum is divided by the sum of the scores, the soft number of RoIs with an object.

    Args:
        student: Mask logits of the student, (M, C, h, w) or (M, 1, h, w).
        teacher: Mask logits of the teacher for the same RoIs, the same shape, without gradient.
        found: The teacher's likeliest category of the M RoIs. The masks of this category are compared.
    """
    logits_S, logits_T = (select_category(masks, found.labels).float() for masks in (student, teacher))
    divergence = binary_kl(logits_S, logits_T).flatten(1).mean(1)
    return (found.scores * divergence).sum() / soft_object_count(found.scores)


def scores_anchors_by_sigmoid(rpn_head: nn.Module) -> bool:
    """Return whether :func:`rpn_predictions` can decode the maps of a proposal network."""
    return isinstance(rpn_head, RPNHead) and rpn_head.use_sigmoid_cls and rpn_head.bbox_coder.encode_size == 4


def two_stage_unsupported_reason(detector: nn.Module) -> str | None:
    """Return why the proposals and RoI heads of ``detector`` cannot be compared, or None if they can.

    Args:
        detector: Any detector.

    Returns:
        The reason, a clause for a message.
    """
    name = type(detector).__name__
    if not isinstance(detector, TwoStageDetector):
        return f'{name} is not a TwoStageDetector'
    rpn: Any = getattr(detector, RPN_HEAD, None)
    roi: Any = getattr(detector, 'roi_head', None)
    box: Any = getattr(roi, 'bbox_head', None)
    for method in ('_forward', 'loss'):
        if getattr(type(detector), method) is not getattr(TwoStageDetector, method):
            return f'{name} overrides {method}()'
    if not scores_anchors_by_sigmoid(rpn):
        return f'its rpn_head, {type(rpn).__name__}, is not an RPNHead with sigmoid scores and 4-value box deltas'
    if not isinstance(roi, StandardRoIHead):
        return f'its roi_head, {type(roi).__name__}, is not a StandardRoIHead'
    for method in ('_bbox_forward', '_mask_forward'):
        if getattr(type(roi), method) is not getattr(StandardRoIHead, method):
            return f'{type(roi).__name__} overrides {method}()'
    if not isinstance(box, BBoxHead) or not (box.with_cls and box.with_reg):
        return f'its box head, {type(box).__name__}, is not a BBoxHead with classes and boxes'
    if box.custom_activation or box.custom_cls_channels:
        return f'{type(box.loss_cls).__name__} defines its own class scores'
    if box.bbox_coder.encode_size != 4:
        return 'its box deltas do not have 4 values'
    for child, module in roi.named_children():
        if child not in STANDARD_PARTS and any(True for _ in module.parameters()):
            return f'its roi_head also has a {child}'
    return None


@MODELS.register_module()
class TwoStagePredictionLoss(WeightedTermsLoss):
    """Divergences of the proposal network's maps, and of classes, boxes and masks of the teacher's RoIs.

    Anchors are compared like the locations of a dense head (:func:`~mmzsq.distillation.dense.dense_terms`), RoIs by
    :func:`box_head_terms` and, if there is a mask head, by :func:`mask_term`.

    Args:
        loss_weight: Factor of the whole loss.
        rpn_weight: Factor of the objectness and of the boxes of anchors.
        class_weight: Factor of the categories of RoIs.
        box_weight: Factor of the boxes of RoIs.
        mask_weight: Factor of the masks.

    Raises:
        UserError: From :meth:`taps`, if the detector has other heads.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        rpn_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, rpn=rpn_weight, classes=class_weight, boxes=box_weight, masks=mask_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the heads.

        Raises:
            UserError: If the detector has other heads.
        """
        reason = two_stage_unsupported_reason(detector)
        if reason is not None:
            raise UserError(
                f'TwoStagePredictionLoss does not support this detector: {reason}. Use '
                "dict(type='mmzsq.PredictionLoss') in zsq.distillation.losses, which chooses a supported loss"
            )
        roi_head: Any = detector.roi_head
        return [RPN_HEAD, ROI_BOX_HEAD, *([ROI_MASK_HEAD] if roi_head.with_mask else [])]

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the heads. Those of the RoI heads belong to the teacher's RoIs.
            teacher: Outputs of the heads on the same images and RoIs, without gradient; also :data:`MASK_ROI_INDICES`
                if there is a mask head.
            detector: The student.
        """
        weights = self.weights
        rpn_coder = detector.rpn_head.bbox_coder
        objectness, _, proposals = dense_terms(
            rpn_predictions(student[RPN_HEAD], rpn_coder), rpn_predictions(teacher[RPN_HEAD], rpn_coder)
        )
        box_coder = detector.roi_head.bbox_head.bbox_coder
        classes, boxes = box_head_terms(student[ROI_BOX_HEAD], teacher[ROI_BOX_HEAD], box_coder)
        loss = weights['rpn'] * (objectness + proposals) + weights['classes'] * classes + weights['boxes'] * boxes
        if ROI_MASK_HEAD in teacher:
            found = foreground(teacher[ROI_BOX_HEAD][0][teacher[MASK_ROI_INDICES][0]])
            loss = loss + weights['masks'] * mask_term(student[ROI_MASK_HEAD][0], teacher[ROI_MASK_HEAD][0], found)
        return self.loss_weight * loss
