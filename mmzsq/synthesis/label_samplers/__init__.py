# SPDX-License-Identifier: Apache-2.0
"""Where the labels of synthetic images come from."""

from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler
from mmzsq.synthesis.label_samplers.base import LabelSampler, RelabelCounts, rescale_labels
from mmzsq.synthesis.label_samplers.random_boxes import MultiBoxSampler, SingleBoxSampler

__all__ = [
    'AdaptiveLabelSampler',
    'LabelSampler',
    'MultiBoxSampler',
    'RelabelCounts',
    'SingleBoxSampler',
    'rescale_labels',
]
