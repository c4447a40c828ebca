# SPDX-License-Identifier: Apache-2.0
"""Distillation of dense heads: objectness, categories and box of each location."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmzsq.boxes import complete_iou
from mmzsq.distillation.base import Outputs, WeightedTermsLoss
from mmzsq.distillation.divergence import binary_kl, soft_object_count
from mmzsq.errors import UserError
from mmzsq.registry import MODELS


class DensePredictions(NamedTuple):
    """Decoded predictions of a dense head at each of its P locations.

    Attributes:
        bboxes: Decoded boxes, xyxy pixels of the network's input, (N, P, 4).
        objectness: Logits that there is an object, (N, P).
        classes: Sigmoid logits of each category, (N, P, C).
    """

    bboxes: Tensor
    objectness: Tensor
    classes: Tensor


class DenseHead(Protocol):
    """Interface of a head that :class:`DensePredictionLoss` supports."""

    def dense_predictions(self, maps: Sequence[Tensor]) -> DensePredictions:
        """Decode the raw maps that the head returns.

        Args:
            maps: All maps of one forward pass, in the order in which the head returns them.
        """


def dense_terms(student: DensePredictions, teacher: DensePredictions) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences of objectness, categories and boxes.

    Objectness is compared at every location (binary KL). Categories (binary KL, summed over categories) and boxes
    (1 - CIoU) are weighted by the teacher's probability of an object. Each term is divided by the sum of these
    probabilities over the batch, the soft number of objects.

    Args:
        student: Predictions of the student: boxes (N, P, 4), objectness (N, P), categories (N, P, C).
        teacher: Predictions of the teacher on the same images, the same shapes, without gradient.

    Returns:
        The divergences of objectness, of categories and of boxes, scalars.
    """
    weight = teacher.objectness.sigmoid()
    total = soft_object_count(weight)
    objectness = binary_kl(student.objectness, teacher.objectness).sum() / total
    classes = (weight * binary_kl(student.classes, teacher.classes).sum(-1)).sum() / total
    boxes = (weight * (1 - complete_iou(student.bboxes, teacher.bboxes))).sum() / total
    return objectness, classes, boxes


def has_dense_predictions(detector: nn.Module, head: str = 'bbox_head') -> bool:
    """Return whether the head of that name in ``detector`` is a :class:`DenseHead`."""
    return hasattr(getattr(detector, head, None), 'dense_predictions')


@MODELS.register_module()
class DensePredictionLoss(WeightedTermsLoss):
    """Divergences of objectness, categories and boxes of a dense head, see :func:`dense_terms`.

    Args:
        loss_weight: Factor of the whole loss.
        objectness_weight: Factor of the objectness term.
        class_weight: Factor of the category term.
        box_weight: Factor of the box term.
        head: Name of the head.

    Raises:
        UserError: From :meth:`taps`, if the head has no ``dense_predictions``.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        objectness_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        head: str = 'bbox_head',
    ) -> None:
        super().__init__(loss_weight, objectness=objectness_weight, classes=class_weight, boxes=box_weight)
        self.head = head

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the name of the head.

        Raises:
            UserError: If the head has no ``dense_predictions``.
        """
        if not has_dense_predictions(detector, self.head):
            raise UserError(
                f'DensePredictionLoss needs {self.head}.dense_predictions(maps), which {type(detector).__name__} '
                "lacks: use dict(type='mmzsq.PredictionKLLoss') in zsq.distillation.losses, or add the method to "
                'the head'
            )
        return [self.head]

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Raw maps of the student's head, by the name of the head.
            teacher: Raw maps of the teacher's head on the same images, without gradient.
            detector: The student. Its head decodes both.
        """
        head = getattr(detector, self.head)
        preds_S, preds_T = (
            DensePredictions(*head.dense_predictions([m.float() for m in outputs[self.head]]))
            for outputs in (student, teacher)
        )
        terms = zip(self.weights.values(), dense_terms(preds_S, preds_T), strict=True)
        return self.loss_weight * torch.stack([w * term for w, term in terms]).sum()
