# SPDX-License-Identifier: Apache-2.0
"""Where the labels of synthetic images come from."""

from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler
from mmzsq.synthesis.label_samplers.base import LabelSampler, RelabelCounts, rescale_labels
from mmzsq.synthesis.label_samplers.masks import ellipse_masks, fit_masks, mask_boxes, resize_masks
from mmzsq.synthesis.label_samplers.random_boxes import MultiBoxSampler, SingleBoxSampler
from mmzsq.synthesis.label_samplers.real import RealLabelSampler

__all__ = [
    'AdaptiveLabelSampler',
    'LabelSampler',
    'MultiBoxSampler',
    'RealLabelSampler',
    'RelabelCounts',
    'SingleBoxSampler',
    'ellipse_masks',
    'fit_masks',
    'mask_boxes',
    'rescale_labels',
    'resize_masks',
]
