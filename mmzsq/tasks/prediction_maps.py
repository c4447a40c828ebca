# SPDX-License-Identifier: Apache-2.0
"""Flatten the prediction maps of a dense head into one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten_maps(maps: Sequence[Tensor], width: int) -> Tensor:
    """Concatenate the maps of all levels in the order of MMDetection's anchors.

    Args:
        maps: Maps of each level, (N, anchors per cell * width, H, W).
        width: Number of outputs per anchor.

    Returns:
        Shape (N, A, width), float32, for the A anchors of all levels.

    Example:
        >>> flatten_maps([torch.zeros(2, 12, 4, 4), torch.zeros(2, 12, 2, 2)], width=4).shape
        torch.Size([2, 60, 4])
    """
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width)) for level in maps], dim=1).float()
