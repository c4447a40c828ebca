# SPDX-License-Identifier: Apache-2.0
"""The targets of a batch as tensors of one shape, for losses that run over all images at once."""

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
    """The targets of N images, padded to M an image.

    Attributes:
        bboxes: Shape (N, M, 4), xyxy in pixels of the network's input.
        labels: Shape (N, M), long.
        valid: Shape (N, M), bool; False where padded.
    """

    bboxes: Tensor
    labels: Tensor
    valid: Tensor


def pad_targets(instances: Sequence[InstanceData], length: int | None = None) -> PaddedTargets:
    """Stack the targets of a batch, without a copy between devices.

    Args:
        instances: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the network's input,
            ``labels`` (n,).
        length: Targets an image to pad to; by default, the most that an image has. A captured graph
            needs it fixed.

    Raises:
        ValueError: If an image has more than ``length`` targets.
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
