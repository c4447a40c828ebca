# SPDX-License-Identifier: Apache-2.0
"""Distillation: what a quantized student is told by its full-precision teacher."""

from mmzsq.distillation.losses import (
    DensePredictionLoss,
    DensePredictions,
    DistillationLoss,
    FeatureMSELoss,
    PredictionKLLoss,
    kl_divergence,
)
from mmzsq.distillation.recorder import Recorder, flatten_tensors, match_modules

__all__ = [
    'DensePredictionLoss',
    'DensePredictions',
    'DistillationLoss',
    'FeatureMSELoss',
    'PredictionKLLoss',
    'Recorder',
    'flatten_tensors',
    'kl_divergence',
    'match_modules',
]
