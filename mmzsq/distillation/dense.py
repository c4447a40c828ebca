# SPDX-License-Identifier: Apache-2.0
"""Distillation of dense heads: what each location says, weighted by how sure the teacher is that something is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmzsq.boxes import complete_iou
from mmzsq.distillation.losses import DistillationLoss, Outputs, binary_kl, soft_object_count
from mmzsq.errors import UserError
from mmzsq.registry import MODELS


class DensePredictions(NamedTuple):
    """What a dense head says at each of its P locations.

    Attributes:
        bboxes: Decoded boxes, xyxy pixels of the network's input, (N, P, 4).
        objectness: Logits that there is an object, (N, P).
        classes: Logits of each category, sigmoid, (N, P, C).
    """

    bboxes: Tensor
    objectness: Tensor
    classes: Tensor


class DenseHead(Protocol):
    """A head that can tell what its raw maps mean; a detector's adapter to :class:`DensePredictionLoss`."""

    def dense_predictions(self, maps: Sequence[Tensor]) -> DensePredictions:
        """Decode raw maps, as many as the head returns."""


def dense_terms(student: DensePredictions, teacher: DensePredictions) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of objectness, of categories and of boxes; each a scalar.

    Objectness is compared everywhere, categories (binary KL, summed over them) and boxes (1 - CIoU) in proportion to
    the teacher's probability of an object; all is divided by the sum of these probabilities over the batch, the soft
    number of objects.
    """
    weight = teacher.objectness.sigmoid()
    total = soft_object_count(weight)
    objectness = binary_kl(student.objectness, teacher.objectness).sum() / total
    classes = (weight * binary_kl(student.classes, teacher.classes).sum(-1)).sum() / total
    boxes = (weight * (1 - complete_iou(student.bboxes, teacher.bboxes))).sum() / total
    return objectness, classes, boxes


def decodes_densely(detector: nn.Module, head: str = 'bbox_head') -> bool:
    """Whether ``detector`` has a :class:`DenseHead` of that name."""
    return hasattr(getattr(detector, head, None), 'dense_predictions')


@MODELS.register_module()
class DensePredictionLoss(DistillationLoss):
    """What each location says: objectness, categories and box, see :func:`dense_terms`.

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
        super().__init__(loss_weight)
        self.weights = (objectness_weight, class_weight, box_weight)
        self.head = head

    def taps(self, detector: nn.Module) -> list[str]:
        """The head."""
        if not decodes_densely(detector, self.head):
            raise UserError(
                f'DensePredictionLoss needs {self.head}.dense_predictions(maps), which {type(detector).__name__} '
                "lacks: use dict(type='mmzsq.PredictionKLLoss') in zsq.distillation.losses, or add the method to "
                'the head'
            )
        return [self.head]

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        head = getattr(detector, self.head)
        preds_S, preds_T = (
            DensePredictions(*head.dense_predictions([m.float() for m in outputs[self.head]]))
            for outputs in (student, teacher)
        )
        terms = zip(self.weights, dense_terms(preds_S, preds_T), strict=True)
        return self.loss_weight * torch.stack([w * term for w, term in terms]).sum()

    def extra_repr(self) -> str:
        """All weights."""
        objectness, classes, boxes = self.weights
        return f'{super().extra_repr()}, objectness={objectness}, classes={classes}, boxes={boxes}'
