# SPDX-License-Identifier: Apache-2.0
"""CrowdDet's second stage for images with fewer objects than a proposal predicts.

Every proposal of CrowdDet (Chu et al. 2020, arXiv:2003.09163) predicts several objects of a crowd. MMDetection assigns
as many labels to it, and fails if an image has fewer: its own data of crowds has no such images.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.roi_heads import MultiInstanceRoIHead
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

OUTSIDE = (-2.0, -2.0, -1.0, -1.0)
"""A box (xyxy, in pixels) that overlaps with nothing in an image."""


class SparseMultiInstanceRoIHead(MultiInstanceRoIHead):
    """MMDetection's ``MultiInstanceRoIHead`` whose loss also takes images with few or no objects.

    Missing objects become ignored boxes outside of the image. Their overlap with every proposal is 0, so that the
    proposals have no further object, and the ignored boxes themselves are no examples. A batch without any object adds
    nothing to the loss, because MMDetection's loss of boxes is not defined for it.
    """

    def loss(self, x: Any, rpn_results_list: Any, batch_data_samples: list[DetDataSample]) -> dict[str, Any]:
        """Compute the loss of the second stage.

        Args:
            x: Feature maps of the neck.
            rpn_results_list: Proposals of each image.
            batch_data_samples: The labels, not changed.

        Returns:
            The loss terms by name.
        """
        if not any(len(sample.gt_instances) for sample in batch_data_samples):
            return dict(loss_rcnn_emd=x[0].new_zeros(()))
        samples = [with_ignored_boxes(sample, self.bbox_assigner.num_instance) for sample in batch_data_samples]
        return dict(super().loss(x, rpn_results_list, samples))


def with_ignored_boxes(sample: DetDataSample, count: int) -> DetDataSample:
    """Add ignored boxes outside of the image, so that at least ``count`` boxes are there.

    Args:
        sample: A sample with ``gt_instances``, and optionally ``ignored_instances``. It is not changed.
        count: Smallest number of objects and ignored boxes.

    Returns:
        ``sample``, or a copy with more ``ignored_instances``. They have ``bboxes`` and the label -1.
    """
    found = sample.gt_instances.bboxes
    ignored = sample.ignored_instances.bboxes if 'ignored_instances' in sample else found[:0]
    missing = count - len(found) - len(ignored)
    if missing <= 0:
        return sample
    added = InstanceData(bboxes=torch.cat((ignored, found.new_tensor([OUTSIDE] * missing))))
    added.labels = sample.gt_instances.labels.new_full((len(added.bboxes),), -1)
    padded = sample.new()
    padded.ignored_instances = added
    return padded


def accept_few_objects(detector: nn.Module) -> None:
    """Make the loss of CrowdDet take images with few or no objects; other detectors stay as they are."""
    for module in detector.modules():
        if type(module) is MultiInstanceRoIHead:
            module.__class__ = SparseMultiInstanceRoIHead
