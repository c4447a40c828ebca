# SPDX-License-Identifier: Apache-2.0
"""Distillation of two-stage detectors whose second stage is more, or other, than one box head and one mask head.

Cascades, grids, points, scores of masks, semantic branches: every head of the second stage is compared on the teacher's
regions (:mod:`mmzsq.qat.comparison` runs them so), in the way of
:class:`~mmzsq.distillation.two_stage.TwoStagePredictionLoss` where its outputs are classes and boxes, by their error
where nothing is known of what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmzsq.distillation.dense import dense_terms
from mmzsq.distillation.losses import DistillationLoss, Outputs
from mmzsq.distillation.two_stage import RPN_HEAD, box_head_terms, rpn_predictions, scores_anchors_by_sigmoid
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

ROI_HEAD = 'roi_head'
SHARED_HEAD = 'shared_head'
"""The part of a RoI head that makes features for others."""


def regions_unsupported_reason(detector: nn.Module) -> str | None:
    """What keeps the heads of ``detector`` from being compared on the same regions, for a message; None if nothing."""
    name = type(detector).__name__
    if not isinstance(detector, TwoStageDetector):
        return f'{name} is no TwoStageDetector'
    if type(detector)._forward is not TwoStageDetector._forward:
        return f'{name} has a _forward() of its own'
    if not (detector.with_rpn and detector.with_roi_head):
        return f'{name} has no rpn_head or no roi_head'
    return None


def region_heads(detector: Any) -> list[str]:
    """Names of the heads of the second stage, each stage of a cascade by itself.

    Args:
        detector: One for which :func:`regions_unsupported_reason` has no reason.
    """
    return [
        f'{ROI_HEAD}.{name}'
        for name, part in _parts(detector.roi_head)
        if name != SHARED_HEAD and not isinstance(part, BaseRoIExtractor)
    ]


def proposal_heads(detector: Any) -> list[str]:
    """Names of what makes the maps of the first stage: the proposal network, or its stages if it only calls these."""
    if type(detector.rpn_head).forward is not nn.Module.forward:
        return [RPN_HEAD]
    return [f'{RPN_HEAD}.{name}' for name, _ in _parts(detector.rpn_head)]


def _parts(head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a head that learn, each stage of a list by itself."""
    for name, child in head.named_children():
        stages = enumerate(child) if isinstance(child, nn.ModuleList) else [(None, child)]
        for index, part in stages:
            if any(True for _ in part.parameters()):
                yield name if index is None else f'{name}.{index}', part


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error as a part of the teacher's mean square, a scalar.

    Args:
        student: Any shape.
        teacher: The same.
    """
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / reduce_mean(teacher.square().mean()).clamp(min=1e-12)


def is_box_output(head: nn.Module, outputs: list[Tensor]) -> bool:
    """Whether ``outputs`` are what a ``BBoxHead`` says of its regions in one call: classes by softmax, and deltas."""
    if not isinstance(head, BBoxHead) or head.custom_activation or head.custom_cls_channels:
        return False
    if head.bbox_coder.encode_size != 4:
        return False
    return head.with_cls and len(outputs) == 1 + head.with_reg and all(output.dim() == 2 for output in outputs)


@MODELS.register_module()
class RegionPredictionLoss(DistillationLoss):
    """What each head of a two-stage detector says of the teacher's regions.

    * the proposal network, where it is MMDetection's ``RPNHead``: as in ``TwoStagePredictionLoss``;
    * box heads: classes and boxes, as there; the mean over the stages of a cascade;
    * all other outputs, of proposal networks of another kind too: :func:`relative_error`, the mean over them.

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
        super().__init__(loss_weight)
        self.weights = (rpn_weight, class_weight, box_weight, other_weight)

    def taps(self, detector: nn.Module) -> list[str]:
        """The heads of both stages.

        Raises:
            UserError: If they cannot be compared on the same regions.
        """
        reason = regions_unsupported_reason(detector)
        if reason is not None:
            raise UserError(
                f"RegionPredictionLoss does not fit: {reason}. Use dict(type='mmzsq.PredictionLoss') in "
                'zsq.distillation.losses, which takes what fits'
            )
        return [*proposal_heads(detector), *region_heads(detector)]

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the heads, those of the second stage on the regions of the teacher's outputs.
            teacher: Outputs of the heads.
            detector: The student.
        """
        rpn_weight, class_weight, box_weight, other_weight = self.weights
        modules = dict(detector.named_modules())
        classes: list[Tensor] = []
        boxes: list[Tensor] = []
        others: list[Tensor] = []
        maps: list[Tensor] = []
        for name in self.taps(detector):
            outputs_S, outputs_T, head = student[name], teacher[name], modules[name]
            if name == RPN_HEAD and scores_anchors_by_sigmoid(head):
                coder: Any = head.bbox_coder
                objectness, _, proposals = dense_terms(
                    rpn_predictions(outputs_S, coder), rpn_predictions(outputs_T, coder)
                )
                maps.append(objectness + proposals)
            elif is_box_output(head, outputs_T):
                of_classes, of_boxes = box_head_terms(outputs_S, outputs_T, head.bbox_coder)
                classes.append(of_classes)
                boxes.append(of_boxes)
            else:
                others.extend(relative_error(s, t) for s, t in zip(outputs_S, outputs_T, strict=True))
        terms = ((rpn_weight, maps), (class_weight, classes), (box_weight, boxes), (other_weight, others))
        means = [weight * torch.stack(values).mean() for weight, values in terms if values]
        return self.loss_weight * torch.stack(means).sum()

    def extra_repr(self) -> str:
        """All weights."""
        rpn, classes, boxes, others = self.weights
        return f'{super().extra_repr()}, rpn={rpn}, classes={classes}, boxes={boxes}, others={others}'
