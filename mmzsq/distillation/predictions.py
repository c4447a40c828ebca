# SPDX-License-Identifier: Apache-2.0
"""Choose the prediction loss that supports the heads of a detector."""

from __future__ import annotations

from mmengine.logging import print_log
from torch import nn

from mmzsq.distillation.base import DistillationLoss
from mmzsq.distillation.dense import DensePredictionLoss, has_dense_predictions
from mmzsq.distillation.prediction_kl import PredictionKLLoss
from mmzsq.distillation.regions import RegionPredictionLoss, regions_unsupported_reason
from mmzsq.distillation.two_stage import TwoStagePredictionLoss, two_stage_unsupported_reason
from mmzsq.registry import MODELS

KL_WEIGHT = 0.1
"""The paper's weight of :class:`PredictionKLLoss` beside the other losses."""


@MODELS.register_module()
class PredictionLoss(DistillationLoss):
    """Placeholder for the prediction loss of a detector; :meth:`resolve` returns the actual loss.

    * A head with ``dense_predictions``: :class:`~mmzsq.distillation.dense.DensePredictionLoss`.
    * A standard two-stage detector: :class:`~mmzsq.distillation.two_stage.TwoStagePredictionLoss`.
    * A two-stage detector with other heads in its second stage, such as a cascade:
      :class:`~mmzsq.distillation.regions.RegionPredictionLoss`. The log gives the reason.
    * Any other detector: :class:`~mmzsq.distillation.prediction_kl.PredictionKLLoss` with the paper's temperature and,
      as in the paper, a tenth of the weight. The log gives the reason.

    Args:
        loss_weight: Factor of the loss.
    """

    def resolve(self, detector: nn.Module) -> DistillationLoss:
        """Return the prediction loss that supports ``detector``."""
        if has_dense_predictions(detector):
            return DensePredictionLoss(loss_weight=self.loss_weight)
        reason = two_stage_unsupported_reason(detector)
        if reason is None:
            return TwoStagePredictionLoss(loss_weight=self.loss_weight)
        if regions_unsupported_reason(detector) is None:
            print_log(
                f'PredictionLoss: {reason}; RegionPredictionLoss compares all heads on the same regions',
                logger='current',
            )
            return RegionPredictionLoss(loss_weight=self.loss_weight)
        print_log(
            f'PredictionLoss: no head with dense_predictions, and {reason}; PredictionKLLoss compares the raw maps',
            logger='current',
        )
        return PredictionKLLoss(loss_weight=KL_WEIGHT * self.loss_weight)
