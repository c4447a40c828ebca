# SPDX-License-Identifier: Apache-2.0
"""Prediction-level distillation of raw maps by a KL divergence (paper, section 3.3, eq. 6).

:mod:`~mmzsq.distillation.dense`, :mod:`~mmzsq.distillation.two_stage` and :mod:`~mmzsq.distillation.regions` compare
decoded predictions instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmzsq.argument_checks import checked_flag, checked_number, checked_patterns
from mmzsq.distillation.base import DistillationLoss, Outputs
from mmzsq.distillation.divergence import kl_divergence, row_shares_of
from mmzsq.errors import UserError
from mmzsq.module_patterns import select_modules
from mmzsq.registry import MODELS

PREDICTION_HEADS = ('rpn_head', 'bbox_head')
"""Attributes of MMDetection's detectors whose outputs are raw prediction maps."""

KL_WEIGHT = 0.1
"""The paper's weight of :class:`PredictionKLLoss` beside the other losses."""

IMAGE_MASK_HEAD = 'mask_head'
"""Attribute of a detector's own mask head, which sees the features of the image, unlike the mask head of a RoI head.

It is a prediction head if the detector predicts masks only. Beside a box head it sees the locations that the box head
selects.
"""


def prediction_heads(detector: nn.Module) -> list[str]:
    """Return the names of the heads of ``detector`` that output raw prediction maps.

    Raises:
        UserError: If there are none.
    """
    heads = [name for name in PREDICTION_HEADS if isinstance(getattr(detector, name, None), nn.Module)]
    if not heads and isinstance(getattr(detector, IMAGE_MASK_HEAD, None), nn.Module):
        heads = [IMAGE_MASK_HEAD]
    if not heads:
        raise UserError(
            f'{type(detector).__name__} has none of {", ".join((*PREDICTION_HEADS, IMAGE_MASK_HEAD))}: name the '
            "modules whose outputs are predictions in the loss, heads=['...']"
        )
    return heads + query_proposal_branches(detector)


def query_proposal_branches(detector: Any) -> list[str]:
    """Return the names of the branches that propose the queries of a two-stage transformer, if any.

    MMDetection appends them to the branches of the decoder layers.
    """
    if not getattr(detector, 'as_two_stage', False):
        return []
    return [f'bbox_head.{branches}.{detector.decoder.num_layers}' for branches in ('cls_branches', 'reg_branches')]


@MODELS.register_module()
class PredictionKLLoss(DistillationLoss):
    """KL divergence of raw prediction maps (paper, eq. 6).

    Each map of an image is flattened into one vector, and a softmax runs over the whole vector. The divergences are
    averaged over images and summed over maps.

    Args:
        tau: Temperature, above 0.
        loss_weight: Factor of the loss.
        join_maps: Whether all maps of an image form one vector (the paper's two-stage setting) instead of one each.
        heads: Patterns of the modules whose outputs are predictions, see :mod:`mmzsq.module_patterns`. By default
            :func:`prediction_heads` chooses them.

    Raises:
        UserError: If an argument is not allowed.
    """

    def __init__(
        self,
        tau: float = 4.0,
        loss_weight: float = 0.1,
        join_maps: bool = False,
        heads: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(loss_weight)
        name = type(self).__name__
        self.tau = checked_number(f'{name}: tau', tau, 0)
        if tau == 0:
            raise UserError(f'{name}: tau must be above 0')
        self.join_maps = checked_flag(f'{name}: join_maps', join_maps)
        self.heads = checked_patterns(f'{name}: heads', heads)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the prediction heads.

        Raises:
            UserError: If none are configured and ``detector`` has none.
        """
        if not self.heads:
            return prediction_heads(detector)
        # In the order of the patterns, which is the order of the maps in a joined vector.
        return list(dict.fromkeys(name for pattern in self.heads for name in select_modules(detector, [pattern])))

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Maps (N, ...) of the prediction heads of the student, by module name.
            teacher: The same maps of the teacher, without gradient.
            detector: The student.
        """
        preds_S, preds_T = (
            [m.flatten(1) for name in self.taps(detector) for m in outputs[name]] for outputs in (student, teacher)
        )
        if self.join_maps:
            preds_S, preds_T = [torch.cat(preds_S, 1)], [torch.cat(preds_T, 1)]
        losses = [kl_divergence(s, t, self.tau).mean() for s, t in zip(preds_S, preds_T, strict=True)]
        shares = row_shares_of(preds_T[:1])
        terms = torch.stack(losses) if shares is None else torch.stack(losses) * shares
        return self.loss_weight * terms.sum()

    def extra_repr(self) -> str:
        """Show weight and temperature."""
        return f'{super().extra_repr()}, tau={self.tau}'
