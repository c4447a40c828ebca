# SPDX-License-Identifier: Apache-2.0
"""What a loss between a full-precision teacher and its quantized student is, and the paper's loss of predictions.

Paper, section 3.3, eq. 6. Feature-level distillation is in :mod:`~mmzsq.distillation.features`, losses that know what
the predictions mean in :mod:`~mmzsq.distillation.dense` and :mod:`~mmzsq.distillation.two_stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.module_patterns import select_modules
from mmzsq.registry import MODELS

PREDICTION_HEADS = ('rpn_head', 'bbox_head')
"""Attributes of MMDetection's detectors whose outputs are raw maps of predictions."""

MASK_HEAD = 'mask_head'
"""The same of a detector that predicts masks alone; beside a box head it sees what that one picks."""

Outputs = dict[str, list[Tensor]]
"""What the modules of one detector returned, by their names."""


class DistillationLoss(nn.Module):
    """A loss over the recorded outputs of teacher and student.

    Args:
        loss_weight: Factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def resolve(self, detector: nn.Module) -> DistillationLoss:
        """Return the loss to use for ``detector``: this one, unless a class picks another by what the detector is."""
        return self

    def taps(self, detector: nn.Module) -> list[str]:
        """Names of the modules of ``detector`` whose outputs :meth:`forward` reads.

        Raises:
            UserError: If the loss does not fit ``detector``.
        """
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the student, by module name.
            teacher: Outputs of the teacher on the same images; no gradient.
            detector: The student, for what its heads know of their outputs.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The weight."""
        return f'loss_weight={self.loss_weight}'


def prediction_heads(detector: nn.Module) -> list[str]:
    """Names of the heads of ``detector`` that return raw prediction maps.

    Raises:
        UserError: If it has none.
    """
    heads = [name for name in PREDICTION_HEADS if isinstance(getattr(detector, name, None), nn.Module)]
    if not heads and isinstance(getattr(detector, MASK_HEAD, None), nn.Module):
        heads = [MASK_HEAD]
    if not heads:
        raise UserError(
            f'{type(detector).__name__} has none of {", ".join((*PREDICTION_HEADS, MASK_HEAD))}: name the modules '
            "whose outputs are predictions in the loss, heads=['...']"
        )
    return heads + query_proposing(detector)


def query_proposing(detector: Any) -> list[str]:
    """Names of the branches by which a transformer proposes its queries; MMDetection keeps them after the decoder's."""
    if not getattr(detector, 'as_two_stage', False):
        return []
    return [f'bbox_head.{branches}.{detector.decoder.num_layers}' for branches in ('cls_branches', 'reg_branches')]


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


def soft_object_count(scores: Tensor) -> Tensor:
    """How many objects a teacher sees in a batch: the sum of its scores, at least 1; a scalar.

    Of several processes each gets the mean of their numbers. The mean of their gradients then is the gradient of one
    process that sees all of the images.

    Args:
        scores: The teacher's probabilities of an object, any shape; no gradient.
    """
    return reduce_mean(scores.sum()).clamp(min=1 / get_world_size())


def binary_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL divergence between Bernoulli distributions given by logits; elementwise, 0 where they agree."""
    target = target_logits.sigmoid()
    return F.binary_cross_entropy_with_logits(logits, target, reduction='none') - (
        F.binary_cross_entropy_with_logits(target_logits, target, reduction='none')
    )


@MODELS.register_module()
class PredictionKLLoss(DistillationLoss):
    """The paper's eq. 6: raw prediction maps as one distribution over all of their values.

    Every map of an image is flattened, one softmax over the whole vector; the divergences are averaged over images and
    summed over maps.

    Args:
        tau: Temperature.
        loss_weight: Factor of the loss.
        join_maps: Whether all maps of an image form one vector (the paper's two-stage setting) instead of one each.
        heads: Patterns of the modules whose outputs are predictions, see :mod:`mmzsq.module_patterns`; None: found on
            the detector.
    """

    def __init__(
        self,
        tau: float = 4.0,
        loss_weight: float = 0.1,
        join_maps: bool = False,
        heads: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(loss_weight)
        self.tau = tau
        self.join_maps = join_maps
        self.heads = [heads] if isinstance(heads, str) else heads

    def taps(self, detector: nn.Module) -> list[str]:
        """The prediction heads."""
        if not self.heads:
            return prediction_heads(detector)
        # In the order of the patterns, which is the order of the maps in a joined vector.
        return list(dict.fromkeys(name for pattern in self.heads for name in select_modules(detector, [pattern])))

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        preds_S, preds_T = (
            [m.flatten(1) for name in self.taps(detector) for m in outputs[name]] for outputs in (student, teacher)
        )
        if self.join_maps:
            preds_S, preds_T = [torch.cat(preds_S, 1)], [torch.cat(preds_T, 1)]
        losses = [kl_divergence(s, t, self.tau).mean() for s, t in zip(preds_S, preds_T, strict=True)]
        return self.loss_weight * torch.stack(losses).sum()

    def extra_repr(self) -> str:
        """Weight and temperature."""
        return f'{super().extra_repr()}, tau={self.tau}'
