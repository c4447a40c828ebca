# SPDX-License-Identifier: Apache-2.0
"""Where the labels of synthetic images come from."""

from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler
from mmzsq.synthesis.label_samplers.base import LabelSampler, RelabelCounts, rescale_labels
from mmzsq.synthesis.label_samplers.detector_prior import DetectorPriorSampler, LabelPrior
from mmzsq.synthesis.label_samplers.false_positive import FalsePositiveSampler
from mmzsq.synthesis.label_samplers.masks import ellipse_masks, fit_masks, mask_boxes, resize_masks
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
    'ellipse_masks',
    'fit_masks',
    'mask_boxes',
    'rescale_labels',
    'resize_masks',
]
