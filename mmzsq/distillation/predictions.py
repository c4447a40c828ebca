# SPDX-License-Identifier: Apache-2.0
"""What a detector says, compared in the way that fits its heads."""

from __future__ import annotations

from mmengine.logging import print_log
from torch import nn

from mmzsq.distillation.dense import DensePredictionLoss, decodes_densely
from mmzsq.distillation.losses import DistillationLoss, PredictionKLLoss
from mmzsq.distillation.regions import RegionPredictionLoss, regions_unsupported_reason
from mmzsq.distillation.two_stage import TwoStagePredictionLoss, two_stage_unsupported_reason
from mmzsq.registry import MODELS

KL_WEIGHT = 0.1
"""The paper's weight of :class:`PredictionKLLoss` beside the others."""


@MODELS.register_module()
class PredictionLoss(DistillationLoss):
    """Stands for the loss of predictions that fits a detector; :meth:`resolve` gives that loss.

    * a head with ``dense_predictions``: :class:`~mmzsq.distillation.dense.DensePredictionLoss`;
    * a two-stage detector: :class:`~mmzsq.distillation.two_stage.TwoStagePredictionLoss`;
    * one with other heads in its second stage, a cascade for one:
      :class:`~mmzsq.distillation.regions.RegionPredictionLoss`; the log says why;
    * all else: :class:`~mmzsq.distillation.losses.PredictionKLLoss` with the paper's temperature and a tenth of the
      weight, as in the paper; the log says why.

    Args:
        loss_weight: Factor of the loss.
    """

    def resolve(self, detector: nn.Module) -> DistillationLoss:
        """Return the loss that fits ``detector``."""
        if decodes_densely(detector):
            return DensePredictionLoss(loss_weight=self.loss_weight)
        reason = two_stage_unsupported_reason(detector)
        if reason is None:
            return TwoStagePredictionLoss(loss_weight=self.loss_weight)
        if regions_unsupported_reason(detector) is None:
            print_log(
                f'PredictionLoss: {reason}; all heads are compared on the same regions by RegionPredictionLoss',
                logger='current',
            )
            return RegionPredictionLoss(loss_weight=self.loss_weight)
        print_log(
            f'PredictionLoss: no head with dense_predictions, and {reason}; raw maps are compared by PredictionKLLoss',
            logger='current',
        )
        return PredictionKLLoss(loss_weight=KL_WEIGHT * self.loss_weight)
