# SPDX-License-Identifier: Apache-2.0
"""Distillation of two-stage detectors whose second stage has more than one box head and one mask head.

Examples are cascades, grid heads, point heads, mask scoring and semantic branches. Every head of the second stage is
compared on the teacher's regions; :mod:`mmzsq.qat.paired_forward` runs both detectors on them. Outputs that are classes
and boxes are compared as in :class:`~mmzsq.distillation.two_stage.TwoStagePredictionLoss`, all other outputs by their
relative error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads.bbox_heads import BBoxHead, DIIHead, MultiInstanceBBoxHead
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from torch import Tensor, nn

from mmzsq.boxes import complete_iou
from mmzsq.distillation.base import Outputs, WeightedTermsLoss
from mmzsq.distillation.dense import dense_terms
from mmzsq.distillation.divergence import relative_errors, row_counts_of, soft_object_count
from mmzsq.distillation.queries import class_divergence, query_scores
from mmzsq.distillation.two_stage import (
    RPN_HEAD,
    box_head_terms,
    decode_on_unit_box,
    rpn_predictions,
    scores_anchors_by_sigmoid,
)
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

ROI_HEAD = 'roi_head'
SHARED_HEAD = 'shared_head'
"""The child of a RoI head that computes features for the other heads."""


def regions_unsupported_reason(detector: nn.Module) -> str | None:
    """Return why the heads of ``detector`` cannot be compared on the same regions, or None if they can.

    Args:
        detector: Any detector.

    Returns:
        The reason, a clause for a message.
    """
    name = type(detector).__name__
    if not isinstance(detector, TwoStageDetector):
        return f'{name} is not a TwoStageDetector'
    if type(detector)._forward is not TwoStageDetector._forward:
        return f'{name} overrides _forward()'
    if not (detector.with_rpn and detector.with_roi_head):
        return f'{name} has no rpn_head or no roi_head'
    return None


def region_heads(detector: Any) -> list[str]:
    """Return the names of the heads of the second stage; each stage of a cascade counts separately.

    Args:
        detector: A detector for which :func:`regions_unsupported_reason` is None.
    """
    return [
        f'{ROI_HEAD}.{name}'
        for name, part in _trained_parts(detector.roi_head)
        if name != SHARED_HEAD and not isinstance(part, BaseRoIExtractor)
    ]


def proposal_heads(detector: Any) -> list[str]:
    """Return the names of the modules that compute the maps of the first stage.

    This is the proposal network, or its children if it has no ``forward`` and only calls them.

    Args:
        detector: A detector for which :func:`regions_unsupported_reason` is None.
    """
    if type(detector.rpn_head).forward is not nn.Module.forward:
        return [RPN_HEAD]
    return [f'{RPN_HEAD}.{name}' for name, _ in _trained_parts(detector.rpn_head)]


def _trained_parts(head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a head that have parameters; the elements of a list separately."""
    for name, child in head.named_children():
        stages = enumerate(child) if isinstance(child, nn.ModuleList) else [(None, child)]
        for index, part in stages:
            if any(True for _ in part.parameters()):
                yield name if index is None else f'{name}.{index}', part


def is_box_output(head: nn.Module, outputs: list[Tensor]) -> bool:
    """Return whether ``outputs`` are the softmax class logits and box deltas of one call of a ``BBoxHead``.

    Args:
        head: The module that returned ``outputs``.
        outputs: Its recorded outputs.
    """
    if not isinstance(head, BBoxHead) or head.custom_activation or head.custom_cls_channels:
        return False
    if head.bbox_coder.encode_size != 4:
        return False
    # SABLHead derives from BBoxHead, but predicts buckets instead of deltas and has none of these flags.
    if not getattr(head, 'with_cls', False):
        return False
    return len(outputs) == 1 + head.with_reg and all(output.dim() == 2 for output in outputs)


def predictions_of_instances(outputs: list[Tensor], head: Any) -> list[tuple[Tensor, Tensor]]:
    """Split the outputs of CrowdDet's head into the predictions of one object per region.

    Args:
        outputs: Class logits (R, K (C + 1)) of K objects per region, the background first, and box deltas (R, 4KC) or
            (R, 4K); the same of the refinement, if there is one.
        head: The ``MultiInstanceBBoxHead`` that returned them.

    Returns:
        Class logits (R, C + 1), the background last, and box deltas of each object, as
        :func:`~mmzsq.distillation.two_stage.box_head_terms` takes them.
    """
    predictions = []
    for logits, deltas in zip(outputs[::2], outputs[1::2], strict=True):
        for of_class, of_box in zip(*(o.chunk(head.num_instance, 1) for o in (logits, deltas)), strict=True):
            predictions.append((of_class.roll(-1, 1), of_box))
    return predictions


def is_query_output(head: nn.Module, outputs: list[Tensor]) -> bool:
    """Return whether ``outputs`` begin with the classes and box deltas of queries, as those of Sparse R-CNN do.

    Args:
        head: The module that returned ``outputs``.
        outputs: Its recorded outputs.
    """
    return isinstance(head, DIIHead) and all(output.dim() == 3 for output in outputs[:2])


def query_head_terms(student: list[Tensor], teacher: list[Tensor], head: Any) -> tuple[Tensor, Tensor]:
    """Divergences of categories and of boxes over the queries of one stage.

    Categories are compared in every query, boxes (1 - CIoU) in proportion to the score. Both are divided by the soft
    number of queries with an object.

    Args:
        student: Class logits (N, Q, C) and box deltas (N, Q, 4) relative to the same regions.
        teacher: The same of the teacher, without gradient.
        head: The head, with its coder.

    Returns:
        The divergences of categories and of boxes, scalars.
    """
    (classes_S, deltas_S), (classes_T, deltas_T) = ([o.float() for o in outputs[:2]] for outputs in (student, teacher))
    softmax = not head.loss_cls.use_sigmoid
    scores = query_scores(classes_T, softmax)
    total = soft_object_count(scores)
    bboxes_S, bboxes_T = (decode_on_unit_box(head.bbox_coder, deltas) for deltas in (deltas_S, deltas_T))
    boxes = (scores * (1 - complete_iou(bboxes_S, bboxes_T))).sum() / total
    return class_divergence(classes_S, classes_T, softmax, total), boxes


@MODELS.register_module()
class RegionPredictionLoss(WeightedTermsLoss):
    """Divergence of every head of a two-stage detector on the teacher's regions.

    * The proposal network, if it is MMDetection's ``RPNHead``: as in ``TwoStagePredictionLoss``.
    * Box heads: classes and boxes as in ``TwoStagePredictionLoss``, averaged over the stages of a cascade. Those of
      Sparse R-CNN and QueryInst are compared query by query (:func:`query_head_terms`).
    * All other outputs, including those of other proposal networks: the squared error relative to the teacher's mean
      square (:func:`~mmzsq.distillation.divergence.relative_errors`), averaged over the outputs.

    Args:
        loss_weight: Factor of the whole loss.
        rpn_weight: Factor of the objectness and of the boxes of anchors.
        class_weight: Factor of the categories of regions.
        box_weight: Factor of the boxes of regions.
        other_weight: Factor of the error of all other outputs.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        rpn_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        other_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, rpn=rpn_weight, classes=class_weight, boxes=box_weight, others=other_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the heads of both stages.

        Raises:
            UserError: If the heads cannot be compared on the same regions.
        """
        reason = regions_unsupported_reason(detector)
        if reason is not None:
            raise UserError(
                f"RegionPredictionLoss does not support this detector: {reason}. Use dict(type='mmzsq.PredictionLoss') "
                'in zsq.distillation.losses, which chooses a supported loss'
            )
        return [*proposal_heads(detector), *region_heads(detector)]

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the heads. Those of the second stage belong to the teacher's regions.
            teacher: Outputs of the heads on the same images and regions, without gradient.
            detector: The student.
        """
        modules = dict(detector.named_modules())
        classes: list[Tensor] = []
        boxes: list[Tensor] = []
        others: list[tuple[Tensor, Tensor]] = []
        maps: list[Tensor] = []
        for name in self.taps(detector):
            outputs_S, outputs_T, head = student[name], teacher[name], modules[name]
            if name == RPN_HEAD and scores_anchors_by_sigmoid(head):
                coder: Any = head.bbox_coder
                objectness, _, proposals = dense_terms(
                    rpn_predictions(outputs_S, coder), rpn_predictions(outputs_T, coder)
                )
                maps.append(objectness + proposals)
            elif isinstance(head, MultiInstanceBBoxHead):
                predictions = zip(*(predictions_of_instances(o, head) for o in (outputs_S, outputs_T)), strict=True)
                for prediction_S, prediction_T in predictions:
                    class_term, box_term = box_head_terms(prediction_S, prediction_T, head.bbox_coder)
                    classes.append(class_term)
                    boxes.append(box_term)
            elif is_box_output(head, outputs_T):
                class_term, box_term = box_head_terms(outputs_S, outputs_T, head.bbox_coder)
                classes.append(class_term)
                boxes.append(box_term)
            elif is_query_output(head, outputs_T):
                class_term, box_term = query_head_terms(outputs_S, outputs_T, head)
                classes.append(class_term)
                boxes.append(box_term)
                others.extend(zip(outputs_S[2:], outputs_T[2:], strict=True))
            else:
                others.extend(zip(outputs_S, outputs_T, strict=True))
        terms = {
            name: torch.stack(values)
            for name, values in (('rpn', maps), ('classes', classes), ('boxes', boxes))
            if values
        }
        if others:
            errors = [(s.float() - t.float()).square().mean() for s, t in others]
            of_teacher = [t for _, t in others]
            terms['others'] = relative_errors(errors, of_teacher, row_counts_of(of_teacher))
        means = [self.weights[name] * values.mean() for name, values in terms.items()]
        return self.loss_weight * torch.stack(means).sum()
