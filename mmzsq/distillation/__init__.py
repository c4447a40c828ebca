# SPDX-License-Identifier: Apache-2.0
"""Distillation: losses between a quantized student and its full-precision teacher."""

from mmzsq.distillation.augmentation import BatchAugmentation
from mmzsq.distillation.base import DistillationLoss, Outputs
from mmzsq.distillation.dense import DensePredictionLoss, DensePredictions
from mmzsq.distillation.divergence import kl_divergence
from mmzsq.distillation.features import FeatureMSELoss, feature_modules, transformer_blocks
from mmzsq.distillation.location_outputs import LocationOutputs
from mmzsq.distillation.locations import LocationPredictionLoss
from mmzsq.distillation.prediction_kl import PredictionKLLoss
from mmzsq.distillation.predictions import PredictionLoss
from mmzsq.distillation.queries import MaskQueryPredictionLoss, QueryPredictionLoss
from mmzsq.distillation.recorder import Recorder, flatten_tensors
from mmzsq.distillation.regions import RegionPredictionLoss, regions_unsupported_reason
from mmzsq.distillation.two_stage import (
    MASK_ROI_INDICES,
    TwoStagePredictionLoss,
    foreground,
    most_confident_indices,
    two_stage_unsupported_reason,
)

__all__ = [
    'MASK_ROI_INDICES',
    'BatchAugmentation',
    'DensePredictionLoss',
    'DensePredictions',
    'DistillationLoss',
    'FeatureMSELoss',
    'LocationOutputs',
    'LocationPredictionLoss',
    'Outputs',
    'MaskQueryPredictionLoss',
    'PredictionKLLoss',
    'PredictionLoss',
    'QueryPredictionLoss',
    'Recorder',
    'RegionPredictionLoss',
    'TwoStagePredictionLoss',
    'feature_modules',
    'flatten_tensors',
    'foreground',
    'kl_divergence',
    'most_confident_indices',
    'transformer_blocks',
    'regions_unsupported_reason',
    'two_stage_unsupported_reason',
]
