# SPDX-License-Identifier: Apache-2.0
"""Box decoding of YOLOv5."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_bboxes(deltas: Tensor, x: Tensor, y: Tensor, anchors: Tensor, stride: int | Tensor) -> Tensor:
    """Decode raw outputs to boxes.

    A center can be up to one cell away from the center of its cell. Sides can be up to four times those of the anchor.

    Args:
        deltas: Raw outputs for center x, center y, width and height, shape (..., 4).
        x: Column of the cell, broadcastable to (...).
        y: Row of the cell, broadcastable to (...).
        anchors: Width and height of the anchor in pixels, broadcastable to (..., 2).
        stride: Stride in pixels, broadcastable to (...).

    Returns:
        Boxes in xyxy pixels of the network's input, shape (..., 4), not clipped.
    """
    shift_x, shift_y, scale_x, scale_y = (2 * deltas.sigmoid()).unbind(-1)
    center_x = (shift_x - 0.5 + x) * stride
    center_y = (shift_y - 0.5 + y) * stride
    half_width = scale_x**2 * anchors[..., 0] / 2
    half_height = scale_y**2 * anchors[..., 1] / 2
    return torch.stack(
        (
            center_x - half_width,
            center_y - half_height,
            center_x + half_width,
            center_y + half_height,
        ),
        dim=-1,
    )
