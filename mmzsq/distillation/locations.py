# SPDX-License-Identifier: Apache-2.0
"""Distillation of the dense heads of MMDetection by location: classes, boxes, score factors and masks.

:mod:`~mmzsq.distillation.location_readers` reads the maps of the heads, and this module compares them. As in
:mod:`~mmzsq.distillation.dense`, all terms are divided by the soft number of objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmzsq.boxes import complete_iou
from mmzsq.distillation.base import DistillationLoss, Outputs, WeightedTermsLoss
from mmzsq.distillation.dense import DensePredictions, dense_terms
from mmzsq.distillation.divergence import binary_kl, kl_divergence, relative_errors, row_counts_of, soft_object_count
from mmzsq.distillation.location_outputs import Constants, LocationOutputs, MapsError, MaskGroup, joint_logits
from mmzsq.distillation.location_readers import LocationReader, head_of, location_reader
from mmzsq.distillation.prediction_kl import KL_WEIGHT, PredictionKLLoss
from mmzsq.errors import UserError
from mmzsq.registry import MODELS
from mmzsq.update_parts import update_mean

MAX_MASKS = 32
"""Masks that are compared per image and mask group: those of the teacher's most confident locations."""


def score_logits(outputs: LocationOutputs) -> Tensor:
    """Return the logits of the scores, (N, P, C): of the classes, multiplied by the factor if there is one."""
    return outputs.classes if outputs.factor is None else joint_logits(outputs.classes, outputs.factor)


def confidence(teacher: LocationOutputs, softmax: bool) -> Tensor:
    """Return the score of the likeliest category of each location, (N, P), in [0, 1].

    Args:
        teacher: Outputs of the teacher.
        softmax: Whether classes are a softmax with the background last.
    """
    if softmax:
        scores = teacher.classes.softmax(-1)[..., :-1].amax(-1)
        return scores if teacher.factor is None else scores * teacher.factor.sigmoid()
    return score_logits(teacher).amax(-1).sigmoid()


def class_term(student: LocationOutputs, teacher: LocationOutputs, softmax: bool, total: Tensor) -> Tensor:
    """Divergence of categories at every location, divided by the soft number of objects; a scalar.

    With a softmax, this is its KL divergence. Otherwise it is the binary KL of the scores, summed over categories. A
    factor such as the centerness is part of the scores, because it is what suppresses locations without an object.

    Args:
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        softmax: Whether classes are a softmax with the background last.
        total: Soft number of objects.
    """
    if softmax:
        return kl_divergence(student.classes, teacher.classes, tau=1.0).sum() / total
    return binary_kl(score_logits(student), score_logits(teacher)).sum() / total


def factor_term(student: LocationOutputs, teacher: LocationOutputs, softmax: bool, total: Tensor) -> Tensor:
    """Binary KL of the factor of the scores, weighted by the class scores alone; a scalar.

    Heads train the factor only where there is an object, so elsewhere it means nothing.

    Args:
        student: Outputs of the student, with a factor.
        teacher: Outputs of the teacher, with a factor.
        softmax: Whether classes are a softmax with the background last.
        total: Soft number of objects.
    """
    assert student.factor is not None and teacher.factor is not None
    weight = confidence(teacher._replace(factor=None), softmax)
    return (weight * binary_kl(student.factor, teacher.factor)).sum() / total


def box_term(student: LocationOutputs, teacher: LocationOutputs, weight: Tensor, total: Tensor) -> Tensor:
    """Divergence of boxes, weighted by the teacher's confidence; a scalar.

    Decoded boxes are compared by 1 - CIoU, averaged over the refinements of a head. A box of zero area has a CIoU of 0
    with itself, which replaces the 1. Distributions of distances add
    their KL divergence, averaged over the four sides. Undecoded values add :func:`spread_error`.

    Args:
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        weight: Confidence of the teacher, (N, P).
        total: Soft number of objects.
    """
    terms = []
    if teacher.bboxes:
        losses = [complete_iou(t, t) - complete_iou(s, t) for s, t in zip(student.bboxes, teacher.bboxes, strict=True)]
        terms.append(torch.stack([(weight * loss).sum() for loss in losses]).mean() / total)
    if student.sides is not None and teacher.sides is not None:
        terms.append((weight * kl_divergence(student.sides, teacher.sides, tau=1.0).mean(-1)).sum() / total)
    if teacher.regressions:
        errors = [
            spread_error(s, t, weight, total) for s, t in zip(student.regressions, teacher.regressions, strict=True)
        ]
        terms.append(torch.stack(errors).mean())
    return torch.stack(terms).sum()


def spread_error(student: Tensor, teacher: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Error of values of unknown meaning, in units of the teacher's spread; a scalar.

    The spread of each value is its standard deviation over all locations, weighted by the confidence. The error is the
    smooth L1 distance, averaged over the K values and weighted over locations.

    Args:
        student: Shape (N, P, K).
        teacher: Shape (N, P, K).
        weight: Confidence of the teacher, (N, P).
        total: Soft number of objects.
    """
    wide = weight[..., None]
    sums = torch.stack([(wide * teacher).sum((0, 1)), (wide * teacher.square()).sum((0, 1))])
    count = weight.sum().expand(1, sums.shape[1])
    # The mean over all parts of the update, which then use the same spread.
    mean, square, count = update_mean(torch.cat([sums, count])).unbind(0)
    count = count.clamp(min=1e-6)
    variance = square / count - (mean / count).square()
    # The floor is for values that do not vary, such as those of a single location.
    spread = torch.maximum(variance, 1e-4 * square / count).clamp(min=1e-12).sqrt()
    error = F.smooth_l1_loss(student / spread, teacher / spread, reduction='none').mean(-1)
    return (weight * error).sum() / total


def mask_term(student: MaskGroup, teacher: MaskGroup, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of the masks of the teacher's most confident locations.

    Args:
        student: Masks of the student.
        teacher: Masks of the teacher.
        weight: Confidence of the teacher, (N, P).

    Returns:
        The binary KL, averaged over pixels and summed over masks in proportion to the confidence, and the sum of these
        confidences; scalars.
    """
    weight = weight[:, teacher.start : teacher.start + teacher.length]
    chosen = weight.topk(min(MAX_MASKS, teacher.length), dim=1)
    divergence = binary_kl(student.logits(chosen.indices), teacher.logits(chosen.indices)).flatten(2).mean(2)
    return (chosen.values * divergence).sum(), chosen.values.sum()


def location_terms(
    student: LocationOutputs, teacher: LocationOutputs, softmax: bool = False, objectness: bool = False
) -> dict[str, Tensor]:
    """Divergences of the outputs of a dense head.

    Args:
        student: Outputs of the student.
        teacher: Outputs of the teacher on the same images, without gradient.
        softmax: Whether classes are a softmax with the background last.
        objectness: Whether the factor is trained at all locations as the probability of an object. Then objectness,
            classes and boxes are compared by :func:`~mmzsq.distillation.dense.dense_terms`, if boxes are decoded.

    Returns:
        Scalars by name: ``'classes'``, and as far as the head has them ``'factor'``, ``'boxes'`` and ``'masks'``.
    """
    terms: dict[str, Tensor] = {}
    if objectness and teacher.factor is not None and student.factor is not None:
        weight = teacher.factor.sigmoid()
        total = soft_object_count(weight)
        boxes = [outputs.bboxes[0] if outputs.bboxes else outputs.classes[..., :0] for outputs in (student, teacher)]
        if teacher.bboxes:
            terms['factor'], terms['classes'], terms['boxes'] = dense_terms(
                DensePredictions(boxes[0], student.factor, student.classes),
                DensePredictions(boxes[1], teacher.factor, teacher.classes),
            )
        else:
            terms['factor'] = binary_kl(student.factor, teacher.factor).sum() / total
            terms['classes'] = (weight * binary_kl(student.classes, teacher.classes).sum(-1)).sum() / total
            terms['boxes'] = box_term(student, teacher, weight, total)
    else:
        weight = confidence(teacher, softmax)
        total = soft_object_count(weight)
        terms['classes'] = class_term(student, teacher, softmax, total)
        if teacher.factor is not None:
            terms['factor'] = factor_term(student, teacher, softmax, total)
        if teacher.bboxes or teacher.sides is not None or teacher.regressions:
            terms['boxes'] = box_term(student, teacher, weight, total)
    masks: list[Tensor] = []
    if teacher.masks:
        pairs = [mask_term(s, t, weight) for s, t in zip(student.masks, teacher.masks, strict=True)]
        divergence, scores = (torch.stack(values) for values in zip(*pairs, strict=True))
        masks.append(divergence.sum() / soft_object_count(scores))
    masks += [
        spread_error(s, t, weight, total) for s, t in zip(student.coefficients, teacher.coefficients, strict=True)
    ]
    if teacher.maps:
        errors = [(s.float() - t.float()).square().mean() for s, t in zip(student.maps, teacher.maps, strict=True)]
        masks.append(relative_errors(errors, teacher.maps, row_counts_of(teacher.maps)).mean())
    if masks:
        terms['masks'] = torch.stack(masks).sum()
    return terms


@MODELS.register_module()
class LocationPredictionLoss(WeightedTermsLoss):
    """Divergences of classes, score factors, boxes and masks of one of MMDetection's dense heads, by location.

    See :func:`location_terms`. If the maps of a head do not have the layout of its class, the loss compares them by
    :class:`~mmzsq.distillation.prediction_kl.PredictionKLLoss` with a tenth of the weight, and the log says so.

    Args:
        loss_weight: Factor of the whole loss.
        class_weight: Factor of the category term.
        factor_weight: Factor of the term of objectness, centerness or a predicted IoU.
        box_weight: Factor of the box term.
        mask_weight: Factor of the mask term.

    Raises:
        UserError: From :meth:`taps`, if the detector has no such head.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        class_weight: float = 1.0,
        factor_weight: float = 1.0,
        box_weight: float = 1.0,
        mask_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight, classes=class_weight, factor=factor_weight, boxes=box_weight, masks=mask_weight)
        self._constants = Constants()
        self._reader: LocationReader | None = None
        self._fallback: DistillationLoss | None = None

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the head, and of the module that computes features of masks, if there is one.

        Raises:
            UserError: If the detector has no dense head of a known kind.
        """
        self._reader = location_reader(detector)
        if self._reader is None:
            raise UserError(
                f'LocationPredictionLoss supports no head of {type(detector).__name__}. Use '
                "dict(type='mmzsq.PredictionLoss') in zsq.distillation.losses, which chooses a supported loss"
            )
        return list(self._reader.taps)

    def forward(self, student: Outputs, teacher: Outputs, detector: Any) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Maps of the student's head, by the name of the head.
            teacher: Maps of the teacher's head on the same images, without gradient.
            detector: The student. Its head decodes both.
        """
        if self._reader is None:
            self.taps(detector)
        assert self._reader is not None
        reader, head = self._reader, head_of(detector, self._reader)
        if self._fallback is None:
            device = teacher[reader.taps[0]][0].device
            try:
                # Autocast would compute sums of many terms in 16 bits.
                with torch.autocast(device.type, enabled=False):
                    with torch.no_grad():
                        read_T = reader.read(head, teacher, self._constants)
                    read_S = reader.read(head, student, self._constants)
                    return self._sum(location_terms(read_S, read_T, reader.softmax, reader.objectness))
            except MapsError as error:
                print_log(
                    f'LocationPredictionLoss: the maps of {type(head).__name__} do not have the layout of its class '
                    f'({error}); PredictionKLLoss compares them instead, without weights of the locations',
                    logger='current',
                )
                self._fallback = PredictionKLLoss(loss_weight=KL_WEIGHT * self.loss_weight, heads=[reader.taps[0]])
        return self._fallback(student, teacher, detector)

    def _sum(self, terms: dict[str, Tensor]) -> Tensor:
        values: Sequence[Tensor] = [self.weights[name] * term for name, term in terms.items()]
        return self.loss_weight * torch.stack(list(values)).sum()
