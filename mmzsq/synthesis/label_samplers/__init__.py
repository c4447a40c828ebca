# SPDX-License-Identifier: Apache-2.0
"""Label samplers: sources of labels for synthetic images."""

from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler
from mmzsq.synthesis.label_samplers.base import LabelPrior, LabelSampler, RelabelCounts, fit_masks, rescale_labels
from mmzsq.synthesis.label_samplers.detector_prior import DetectorPriorSampler
from mmzsq.synthesis.label_samplers.false_positive import FalsePositiveSampler
from mmzsq.synthesis.label_samplers.random_boxes import MultiBoxSampler, SingleBoxSampler
from mmzsq.synthesis.label_samplers.real import RealLabelSampler
from mmzsq.synthesis.label_samplers.tile import TileSampler

__all__ = [
    'AdaptiveLabelSampler',
    'DetectorPriorSampler',
    'FalsePositiveSampler',
    'LabelPrior',
    'LabelSampler',
    'MultiBoxSampler',
    'RealLabelSampler',
    'RelabelCounts',
    'SingleBoxSampler',
    'TileSampler',
    'fit_masks',
    'rescale_labels',
]
