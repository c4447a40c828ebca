# SPDX-License-Identifier: Apache-2.0
"""Prediction maps of a dense head as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten_maps(maps: Sequence[Tensor], width: int) -> Tensor:
    """Put maps (N, anchors * width, H, W) of all levels in the order of the anchors: (N, A, width), float32."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width)) for level in maps], dim=1).float()
