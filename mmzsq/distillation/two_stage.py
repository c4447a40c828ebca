# SPDX-License-Identifier: Apache-2.0
"""Distillation of two-stage detectors: what the region proposal network says, and what the heads say of the same RoIs.

Teacher and student are compared on the teacher's proposals: answers to different regions could not be compared.
:mod:`mmzsq.qat.comparison` runs them so; here is the loss. It knows MMDetection's ``TwoStageDetector`` and no
architecture.
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
from mmzsq.distillation.dense import DensePredictions, dense_terms
from mmzsq.distillation.losses import DistillationLoss, Outputs, binary_kl, kl_divergence, soft_object_count
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

RPN_HEAD = 'rpn_head'
BOX_HEAD = 'roi_head.bbox_head'
MASK_HEAD = 'roi_head.mask_head'

STANDARD_PARTS = ('bbox_roi_extractor', 'bbox_head', 'mask_roi_extractor', 'mask_head', 'shared_head')
"""All that a ``StandardRoIHead`` has by itself."""

MASK_ROIS = 'mask_rois'
"""Entry of the outputs beside those of modules: which of the box head's RoIs the mask head saw, (M,), int64."""


class Foreground(NamedTuple):
    """What a box head takes each of R RoIs for.

    Attributes:
        scores: Probability of the likeliest category, (R,).
        labels: That category, (R,), int64.
    """

    scores: Tensor
    labels: Tensor


def foreground(class_logits: Tensor) -> Foreground:
    """Likeliest category of each RoI.

    Args:
        class_logits: (R, C + 1), the background last.
    """
    return Foreground(*class_logits.float().softmax(-1)[:, :-1].max(-1))


def most_confident(scores: Tensor, counts: Sequence[int], limit: int) -> Tensor:
    """Positions of the RoIs of the best scores, so many of each image.

    Args:
        scores: One a RoI, images one after the other, (R,).
        counts: RoIs of each image.
        limit: RoIs an image at most.

    Returns:
        Positions in ``scores``, int64, images in order, best first.
    """
    starts = [sum(counts[:image]) for image in range(len(counts))]
    parts = zip(starts, scores.split(list(counts)), strict=True)
    return torch.cat([start + part.topk(min(limit, len(part))).indices for start, part in parts])


def decode_on_unit_box(coder: Any, deltas: Tensor) -> Tensor:
    """Boxes in the frame of the anchor or RoI that they are relative to, which is the unit square.

    The IoU of two boxes that are relative to the same anchor is the same there as in the image.

    Args:
        coder: MMDetection's box coder of the head.
        deltas: (..., 4).

    Returns:
        Boxes, xyxy, not clipped, the same shape.
    """
    flat = deltas.reshape(-1, 4)
    unit = torch.zeros_like(flat)
    unit[:, 2:] = 1
    return get_box_tensor(coder.decode(unit, flat)).view(deltas.shape)


def rpn_predictions(maps: Sequence[Tensor], coder: Any) -> DensePredictions:
    """Read the maps of an ``RPNHead`` that scores by sigmoid.

    Args:
        maps: Objectness logits (N, A, H, W) of every level, then box deltas (N, 4A, H, W) of every level.
        coder: Its box coder.

    Returns:
        One location an anchor; boxes in the frame of their anchors, no categories.
    """
    levels = len(maps) // 2
    rows = [m.float().permute(0, 2, 3, 1).flatten(1) for m in maps]
    objectness = torch.cat(rows[:levels], 1)
    deltas = torch.cat(rows[levels:], 1).unflatten(1, (-1, 4))
    return DensePredictions(decode_on_unit_box(coder, deltas), objectness, objectness.new_zeros(*objectness.shape, 0))


def box_head_terms(student: Sequence[Tensor], teacher: Sequence[Tensor], coder: Any) -> tuple[Tensor, Tensor]:
    """Divergence of categories and of boxes over R RoIs; each a scalar.

    Categories, with the background, are compared in every RoI (KL of the softmax), boxes (1 - CIoU of those of the
    teacher's likeliest category) in proportion to its probability. Both are divided by the sum of these probabilities
    over the batch, the soft number of RoIs with an object.

    Args:
        student: Class logits (R, C + 1), the background last, and box deltas (R, 4C) or (R, 4), unless the head gives
            none; then their divergence is 0.
        teacher: The same.
        coder: The box coder of the head.
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
    """Divergence of masks: binary KL, a mean over pixels; of RoIs in proportion to the teacher's scores.

    Divided by the sum of these scores, the soft number of RoIs with an object.

    Args:
        student: Mask logits (M, C, h, w) or (M, 1, h, w).
        teacher: The same.
        found: What the teacher takes the M RoIs for; the mask of that category is compared.
    """
    logits_S, logits_T = (select_category(masks, found.labels).float() for masks in (student, teacher))
    divergence = binary_kl(logits_S, logits_T).flatten(1).mean(1)
    return (found.scores * divergence).sum() / soft_object_count(found.scores)


def scores_anchors_by_sigmoid(rpn_head: nn.Module) -> bool:
    """Whether the maps of a proposal network are what :func:`rpn_predictions` reads."""
    return isinstance(rpn_head, RPNHead) and rpn_head.use_sigmoid_cls and rpn_head.bbox_coder.encode_size == 4


def two_stage_unsupported_reason(detector: nn.Module) -> str | None:
    """What keeps proposals and RoIs of ``detector`` from being compared, for a message; None if nothing does."""
    name = type(detector).__name__
    if not isinstance(detector, TwoStageDetector):
        return f'{name} is no TwoStageDetector'
    rpn: Any = getattr(detector, RPN_HEAD, None)
    roi: Any = getattr(detector, 'roi_head', None)
    box: Any = getattr(roi, 'bbox_head', None)
    for method in ('_forward', 'loss'):
        if getattr(type(detector), method) is not getattr(TwoStageDetector, method):
            return f'{name} has a {method}() of its own'
    if not scores_anchors_by_sigmoid(rpn):
        return f'its rpn_head is no RPNHead that scores by sigmoid, of boxes by four numbers, but {type(rpn).__name__}'
    if not isinstance(roi, StandardRoIHead):
        return f'its roi_head is no StandardRoIHead but {type(roi).__name__}'
    for method in ('_bbox_forward', '_mask_forward'):
        if getattr(type(roi), method) is not getattr(StandardRoIHead, method):
            return f'{type(roi).__name__} has a {method}() of its own'
    if not isinstance(box, BBoxHead) or not (box.with_cls and box.with_reg):
        return f'its box head is no BBoxHead with classes and boxes but {type(box).__name__}'
    if box.custom_activation or box.custom_cls_channels:
        return f'{type(box.loss_cls).__name__} gives class scores a meaning of its own'
    if box.bbox_coder.encode_size != 4:
        return 'its boxes are not coded by four numbers'
    for child, module in roi.named_children():
        if child not in STANDARD_PARTS and any(True for _ in module.parameters()):
            return f'its roi_head has a {child} too'
    return None


@MODELS.register_module()
class TwoStagePredictionLoss(DistillationLoss):
    """What a two-stage detector says: maps of the proposal network, and classes, boxes and masks of the same RoIs.

    Anchors are compared as the locations of a dense head are (:func:`~mmzsq.distillation.dense.dense_terms`), RoIs by
    :func:`box_head_terms` and, where there is a mask head, :func:`mask_term`.

    Args:
        loss_weight: Factor of the whole loss.
        rpn_weight: Factor of the objectness and of the boxes of anchors.
        class_weight: Factor of the categories of RoIs.
        box_weight: Factor of the boxes of RoIs.
        mask_weight: Factor of the masks.

    Raises:
        UserError: From :meth:`taps`, if the detector has other heads than these.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        rpn_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight)
        self.weights = (rpn_weight, class_weight, box_weight, mask_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """The heads."""
        reason = two_stage_unsupported_reason(detector)
        if reason is not None:
            raise UserError(
                f"TwoStagePredictionLoss does not fit: {reason}. Use dict(type='mmzsq.PredictionLoss') in "
                'zsq.distillation.losses, which takes what fits'
            )
        roi_head: Any = detector.roi_head
        return [RPN_HEAD, BOX_HEAD, *([MASK_HEAD] if roi_head.with_mask else [])]

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the heads; those of the RoI head on the RoIs of the teacher's outputs.
            teacher: Outputs of the heads, and :data:`MASK_ROIS` if there is a mask head.
            detector: The student.
        """
        rpn_weight, class_weight, box_weight, mask_weight = self.weights
        rpn_coder = detector.rpn_head.bbox_coder
        objectness, _, proposals = dense_terms(
            rpn_predictions(student[RPN_HEAD], rpn_coder), rpn_predictions(teacher[RPN_HEAD], rpn_coder)
        )
        box_coder = detector.roi_head.bbox_head.bbox_coder
        classes, boxes = box_head_terms(student[BOX_HEAD], teacher[BOX_HEAD], box_coder)
        loss = rpn_weight * (objectness + proposals) + class_weight * classes + box_weight * boxes
        if MASK_HEAD in teacher:
            found = foreground(teacher[BOX_HEAD][0][teacher[MASK_ROIS][0]])
            loss = loss + mask_weight * mask_term(student[MASK_HEAD][0], teacher[MASK_HEAD][0], found)
        return self.loss_weight * loss

    def extra_repr(self) -> str:
        """All weights."""
        rpn, classes, boxes, masks = self.weights
        return f'{super().extra_repr()}, rpn={rpn}, classes={classes}, boxes={boxes}, masks={masks}'
