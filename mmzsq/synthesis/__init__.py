# SPDX-License-Identifier: Apache-2.0
"""Synthetic images and their labels: where they start, what they become, how they are kept."""

from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.label_samplers import (
    AdaptiveLabelSampler,
    LabelSampler,
    MultiBoxSampler,
    RelabelCounts,
    SingleBoxSampler,
    rescale_labels,
)

__all__ = [
    'AdaptiveLabelSampler',
    'CalibrationSet',
    'LabelSampler',
    'MultiBoxSampler',
    'RelabelCounts',
    'SingleBoxSampler',
    'rescale_labels',
]
