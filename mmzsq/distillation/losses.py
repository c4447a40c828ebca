# SPDX-License-Identifier: Apache-2.0
"""Losses between a full-precision teacher and its quantized student, on the same images.

Paper, section 3.3: prediction-matching distillation (eq. 6) and feature-level distillation (eq. 7). Beside them a loss
that compares what each location of a dense head says, weighted by how sure the teacher is that something is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzsq.distillation.recorder import match_modules
from mmzsq.errors import UserError
from mmzsq.geometry import complete_iou
from mmzsq.registry import MODELS

PREDICTION_HEADS = ('rpn_head', 'bbox_head')
"""Attributes of MMDetection's detectors whose outputs are raw maps of predictions."""

Outputs = dict[str, list[Tensor]]


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


class DistillationLoss(nn.Module):
    """A loss over the recorded outputs of teacher and student.

    Args:
        loss_weight: Factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def taps(self, detector: nn.Module) -> list[str]:
        """Names of the modules of ``detector`` whose outputs :meth:`forward` reads."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the student, by module name.
            teacher: Outputs of the teacher on the same images; no gradient.
            detector: The student, for what its heads know of their outputs.
        """
        raise NotImplementedError


def prediction_heads(detector: nn.Module) -> list[str]:
    """Names of the heads of ``detector`` that return raw prediction maps.

    Raises:
        UserError: If it has none.
    """
    heads = [name for name in PREDICTION_HEADS if isinstance(getattr(detector, name, None), nn.Module)]
    if not heads:
        raise UserError(
            f'{type(detector).__name__} has none of {", ".join(PREDICTION_HEADS)}: name the modules whose outputs are '
            "predictions in the loss, heads=['...']"
        )
    return heads


def kl_divergence(preds_S: Tensor, preds_T: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(softmax(preds_T / tau) || softmax(preds_S / tau)) over the last dimension, summed over it.

    Args:
        preds_S: The student's logits, (..., K).
        preds_T: The teacher's, the same shape.
        tau: Temperature.

    Returns:
        Shape (...).
    """
    log_student = F.log_softmax(preds_S.float() / tau, dim=-1)
    log_teacher = F.log_softmax(preds_T.float() / tau, dim=-1)
    return tau**2 * F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(-1)


@MODELS.register_module()
class PredictionKLLoss(DistillationLoss):
    """The paper's eq. 6: raw prediction maps as one distribution over all of their values.

    Every map of an image is flattened, one softmax over the whole vector; the divergences are averaged over images and
    summed over maps.

    Args:
        tau: Temperature.
        loss_weight: Factor of the loss.
        join_maps: Whether all maps of an image form one vector (the paper's two-stage setting) instead of one each.
        heads: Names of the modules whose outputs are predictions; None: found on the detector.
    """

    def __init__(
        self,
        tau: float = 4.0,
        loss_weight: float = 0.1,
        join_maps: bool = False,
        heads: Sequence[str] | None = None,
    ) -> None:
        super().__init__(loss_weight)
        self.tau = tau
        self.join_maps = join_maps
        self.heads = heads

    def taps(self, detector: nn.Module) -> list[str]:
        """The prediction heads."""
        return list(self.heads) if self.heads else prediction_heads(detector)

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        preds_S, preds_T = (
            [m.flatten(1) for name in self.taps(detector) for m in outputs[name]] for outputs in (student, teacher)
        )
        if self.join_maps:
            preds_S, preds_T = [torch.cat(preds_S, 1)], [torch.cat(preds_T, 1)]
        losses = [kl_divergence(s, t, self.tau).mean() for s, t in zip(preds_S, preds_T, strict=True)]
        return self.loss_weight * torch.stack(losses).sum()


@MODELS.register_module()
class FeatureMSELoss(DistillationLoss):
    """The paper's eq. 7: mean squared difference of feature maps, averaged over layers.

    Args:
        modules: Patterns of module names, see :func:`~mmzsq.distillation.recorder.match_modules`.
        loss_weight: Factor of the loss.
        normalise: Whether each layer's error is divided by the mean square of the teacher's features, so that layers of
            large activations do not outweigh the others.
    """

    def __init__(self, modules: Sequence[str], loss_weight: float = 1.0, normalise: bool = False) -> None:
        super().__init__(loss_weight)
        self.patterns = [modules] if isinstance(modules, str) else list(modules)
        self.normalise = normalise

    def taps(self, detector: nn.Module) -> list[str]:
        """The modules that the patterns select."""
        return match_modules(detector, self.patterns)

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        losses: list[Tensor] = []
        for name, features in teacher.items():
            if name in self._names(detector):
                losses.extend(self._layer(s.float(), t.float()) for s, t in zip(student[name], features, strict=True))
        return self.loss_weight * torch.stack(losses).mean()

    def _names(self, detector: nn.Module) -> set[str]:
        if not hasattr(self, '_tapped'):
            self._tapped = set(self.taps(detector))
        return self._tapped

    def _layer(self, student: Tensor, teacher: Tensor) -> Tensor:
        error = F.mse_loss(student, teacher)
        return error / teacher.square().mean().clamp(min=1e-12) if self.normalise else error


def binary_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL divergence between Bernoulli distributions given by logits; elementwise, 0 where they agree."""
    target = target_logits.sigmoid()
    return F.binary_cross_entropy_with_logits(logits, target, reduction='none') - (
        F.binary_cross_entropy_with_logits(target_logits, target, reduction='none')
    )


@MODELS.register_module()
class DensePredictionLoss(DistillationLoss):
    """What each location says: objectness, categories and box, weighted by the teacher's objectness.

    Objectness is compared everywhere, categories (binary KL, summed over them) and boxes (1 - CIoU) in proportion to
    the teacher's probability of an object; all is divided by the sum of these probabilities over the batch, the soft
    number of objects.

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
        if not hasattr(getattr(detector, self.head, None), 'dense_predictions'):
            raise UserError(
                f'DensePredictionLoss needs {self.head}.dense_predictions(maps), which {type(detector).__name__} '
                "lacks: use dict(type='mmzsq.PredictionKLLoss') in zsq.distillation.losses, or add the method to "
                'the head'
            )
        return [self.head]

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        head = getattr(detector, self.head)
        boxes_S, objectness_S, classes_S = head.dense_predictions([m.float() for m in student[self.head]])
        boxes_T, objectness_T, classes_T = head.dense_predictions([m.float() for m in teacher[self.head]])
        weight = objectness_T.sigmoid()
        total = weight.sum().clamp(min=1.0)
        objectness = binary_kl(objectness_S, objectness_T).sum() / total
        classes = (weight * binary_kl(classes_S, classes_T).sum(-1)).sum() / total
        boxes = (weight * (1 - complete_iou(boxes_S, boxes_T))).sum() / total
        terms = zip(self.weights, (objectness, classes, boxes), strict=True)
        return self.loss_weight * torch.stack([w * term for w, term in terms]).sum()
