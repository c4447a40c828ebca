# SPDX-License-Identifier: Apache-2.0
"""Label assignment of YOLOv5 for a whole batch.

A target is matched to an anchor if the ratio of their sides is below a threshold. It is assigned to the cell that
contains its center and to the nearest neighbors of this cell along x and along y. So each target has at most A * 5
candidates per scale. All candidates are kept, with a mask, so that shapes depend only on the padded length and the host
never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets


class Candidates(NamedTuple):
    """Candidate cells of each target on L scales.

    The last dimension is the cell of the center and its left, upper, right and lower neighbors.

    Attributes:
        x: Column of the cell, clamped to the map, shape (L, N, M, 1, 5), long.
        y: Row of the cell, clamped to the map, shape (L, N, M, 1, 5), long.
        matched: Whether the target is assigned to this cell and anchor, shape (L, N, M, A, 5), bool.
    """

    x: Tensor
    y: Tensor
    matched: Tensor


def find_candidates(
    targets: PaddedTargets,
    anchors: Tensor,
    strides: Tensor,
    rows: Tensor,
    columns: Tensor,
    max_ratio: float,
) -> Candidates:
    """Find the cells and anchors that each target is assigned to, on all scales at once.

    Args:
        targets: Targets of the batch.
        anchors: Width and height of the anchors of each scale in pixels, shape (L, A, 2).
        strides: Stride of each scale in pixels, shape (L,).
        rows: Number of rows of each scale's map, shape (L,).
        columns: Number of columns of each scale's map, shape (L,).
        max_ratio: Upper bound of the ratio of target and anchor sides, in both directions.
    """
    strides, rows, columns = (of_scale.view(-1, 1, 1) for of_scale in (strides, rows, columns))
    low, high = targets.bboxes.float().chunk(2, dim=-1)
    x, y = ((low + high) / (2 * strides[..., None])).unbind(-1)
    ratio = (high - low)[:, :, None] / anchors[:, None, None]
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < max_ratio
    near = torch.stack(
        (
            torch.ones_like(x, dtype=torch.bool),
            _is_near_edge(x),
            _is_near_edge(y),
            _is_near_edge(columns - x),
            _is_near_edge(rows - y),
        ),
        dim=-1,
    )
    cell_x = _inside(torch.stack((x, x - 0.5, x, x + 0.5, x), dim=-1), columns)
    cell_y = _inside(torch.stack((y, y, y - 0.5, y, y + 0.5), dim=-1), rows)
    matched = targets.valid[:, :, None, None] & fits[..., None] & near[:, :, :, None]
    return Candidates(cell_x[:, :, :, None], cell_y[:, :, :, None], matched)


def _is_near_edge(distance: Tensor) -> Tensor:
    """Return whether a center is nearest to the neighbor on one side.

    Args:
        distance: Distance in cells from the map's border on that side.
    """
    return (distance % 1 < 0.5) & (distance > 1)


def _inside(coordinate: Tensor, cells: Tensor) -> Tensor:
    """Return the index of the cell that contains a coordinate (L, N, M, 5), clamped to the number of ``cells``."""
    return torch.minimum(coordinate.long().clamp(min=0), cells[..., None].long() - 1)
