# SPDX-License-Identifier: Apache-2.0
"""Synthetic images and their labels: where they start, what they become, how they are kept."""

from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.generator import CalibrationSetGenerator, Stage
from mmzsq.synthesis.label_samplers import (
    AdaptiveLabelSampler,
    FalsePositiveSampler,
    LabelSampler,
    MultiBoxSampler,
    RealLabelSampler,
    RelabelCounts,
    SingleBoxSampler,
    TileSampler,
    rescale_labels,
)
from mmzsq.synthesis.patch_similarity import PatchSimilarityPrior
from mmzsq.synthesis.priors import BNStatisticsPrior, Prior, TotalVariationPrior, select_priors
from mmzsq.synthesis.synthesizer import StepProgress, SynthesisResult, Synthesizer, Task

__all__ = [
    'BNStatisticsPrior',
    'CalibrationSetGenerator',
    'Stage',
    'PatchSimilarityPrior',
    'Prior',
    'StepProgress',
    'SynthesisResult',
    'Synthesizer',
    'Task',
    'TotalVariationPrior',
    'AdaptiveLabelSampler',
    'CalibrationSet',
    'FalsePositiveSampler',
    'LabelSampler',
    'MultiBoxSampler',
    'RealLabelSampler',
    'RelabelCounts',
    'SingleBoxSampler',
    'TileSampler',
    'rescale_labels',
    'select_priors',
]
