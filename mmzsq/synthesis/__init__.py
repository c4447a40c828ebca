# SPDX-License-Identifier: Apache-2.0
"""Synthesis of calibration sets: label samplers, priors, image optimization, and storage on disk."""

from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.default_sizes import complete_sizes
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
from mmzsq.synthesis.picture_sets import MixedGenerator, PictureLabels, ProceduralGenerator, no_labels
from mmzsq.synthesis.priors import BNStatisticsPrior, NoFeaturePriorError, Prior, TotalVariationPrior, select_priors
from mmzsq.synthesis.synthesizer import StepProgress, SynthesisResult, SynthesisTask, Synthesizer

__all__ = [
    'BNStatisticsPrior',
    'CalibrationSetGenerator',
    'Stage',
    'MixedGenerator',
    'NoFeaturePriorError',
    'PatchSimilarityPrior',
    'PictureLabels',
    'ProceduralGenerator',
    'Prior',
    'StepProgress',
    'SynthesisResult',
    'SynthesisTask',
    'Synthesizer',
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
    'complete_sizes',
    'no_labels',
    'rescale_labels',
    'select_priors',
]
