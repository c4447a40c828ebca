# SPDX-License-Identifier: Apache-2.0
"""Targets of a batch, padded to one shape, for losses that run over all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class PaddedTargets(NamedTuple):
    """Targets of N images, padded to M targets per image.

    Attributes:
        bboxes: Boxes in xyxy pixels of the network's input, (N, M, 4).
        labels: Class indices, (N, M), long.
        valid: False for padding, (N, M), bool.
    """

    bboxes: Tensor
    labels: Tensor
    valid: Tensor


def pad_targets(instances: Sequence[InstanceData], length: int | None = None) -> PaddedTargets:
    """Pad and stack the targets of a batch, without copies between devices.

    Args:
        instances: One entry per image with ``bboxes`` (n, 4) in xyxy pixels of the network's input and ``labels`` (n,).
        length: Number of targets per image to pad to; by default, the largest number in the batch. A captured CUDA
            graph needs a fixed length.

    Raises:
        ValueError: If an image has more than ``length`` targets.

    Example:
        >>> image = InstanceData(bboxes=torch.zeros(2, 4), labels=torch.tensor([3, 5]))
        >>> pad_targets([image], length=4).labels
        tensor([[3, 5, 0, 0]])
    """
    bboxes = pad_sequence([get_box_tensor(image.bboxes) for image in instances], batch_first=True)
    labels = pad_sequence([image.labels for image in instances], batch_first=True)
    valid = pad_sequence([torch.ones_like(image.labels, dtype=torch.bool) for image in instances], batch_first=True)
    if length is not None:
        missing = length - labels.shape[1]
        if missing < 0:
            raise ValueError(f'an image has {labels.shape[1]} targets, more than the length {length} to pad to')
        bboxes = F.pad(bboxes, (0, 0, 0, missing))
        labels, valid = F.pad(labels, (0, missing)), F.pad(valid, (0, missing))
    return PaddedTargets(bboxes, labels, valid)
