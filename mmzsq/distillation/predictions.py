# SPDX-License-Identifier: Apache-2.0
"""Choose the prediction loss that supports the heads of a detector."""

from __future__ import annotations

from mmdet.models.detectors import MaskFormer
from mmengine.logging import print_log
from torch import nn

from mmzsq.distillation.base import DistillationLoss
from mmzsq.distillation.dense import DensePredictionLoss, has_dense_predictions
from mmzsq.distillation.location_readers import LocationReader, location_reader
from mmzsq.distillation.locations import LocationPredictionLoss
from mmzsq.distillation.prediction_kl import KL_WEIGHT, PredictionKLLoss
from mmzsq.distillation.queries import MaskQueryPredictionLoss, QueryPredictionLoss, queries_unsupported_reason
from mmzsq.distillation.regions import RegionPredictionLoss, regions_unsupported_reason
from mmzsq.distillation.two_stage import TwoStagePredictionLoss, two_stage_unsupported_reason
from mmzsq.registry import MODELS


@MODELS.register_module()
class PredictionLoss(DistillationLoss):
    """Placeholder for the prediction loss of a detector; :meth:`resolve` returns the actual loss.

    * A head with ``dense_predictions``: :class:`~mmzsq.distillation.dense.DensePredictionLoss`.
    * A standard two-stage detector: :class:`~mmzsq.distillation.two_stage.TwoStagePredictionLoss`.
    * A two-stage detector with other heads in its second stage, such as a cascade:
      :class:`~mmzsq.distillation.regions.RegionPredictionLoss`. The log gives the reason.
    * A transformer: :class:`~mmzsq.distillation.queries.QueryPredictionLoss`.
    * MaskFormer or Mask2Former: :class:`~mmzsq.distillation.queries.MaskQueryPredictionLoss`.
    * Another dense head of MMDetection, or a subclass of one:
      :class:`~mmzsq.distillation.locations.LocationPredictionLoss`. The log gives what it compares.
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
        if queries_unsupported_reason(detector) is None:
            print_log(
                f'PredictionLoss: {type(detector).__name__}: QueryPredictionLoss compares classes and boxes of each '
                'query and decoder layer',
                logger='current',
            )
            return QueryPredictionLoss(loss_weight=self.loss_weight)
        if isinstance(detector, MaskFormer):
            print_log(
                f'PredictionLoss: {type(detector).__name__}: MaskQueryPredictionLoss compares classes and masks of '
                'each query and decoder layer',
                logger='current',
            )
            return MaskQueryPredictionLoss(loss_weight=self.loss_weight)
        reader = location_reader(detector)
        if reader is not None:
            print_log(f'PredictionLoss: {_describe(reader, detector)}', logger='current')
            return LocationPredictionLoss(loss_weight=self.loss_weight)
        print_log(
            f'PredictionLoss: no head with dense_predictions and none of a known kind, and {reason}; PredictionKLLoss '
            'compares the raw maps. Lost: boxes are not decoded, and locations with and without objects count alike',
            logger='current',
        )
        return PredictionKLLoss(loss_weight=KL_WEIGHT * self.loss_weight)


def _describe(reader: LocationReader, detector: nn.Module) -> str:
    head = type(getattr(detector, reader.taps[0])).__name__
    lost = f'. Compared as raw values only: {reader.lost}' if reader.lost else ''
    return f'{head}: LocationPredictionLoss compares {reader.compared} by location{lost}'
