# SPDX-License-Identifier: Apache-2.0
"""Which cells and anchors of YOLOv5 answer for which target, for a whole batch at once.

A target fits an anchor whose sides differ from its own by a factor below a threshold. It is
answered for by the cell that holds its center and by the nearest neighbors along x and along y.
Every target therefore has at most A * 5 candidates on a scale; all are kept, with a mask, so that
shapes depend on nothing but the padded length and no step waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets


class Candidates(NamedTuple):
    """The cells that may answer for each target, on L scales.

    The last dimension is the cell of the center, then its neighbor left, up, right and down.

    Attributes:
        x: Column of the cell, shape (L, N, M, 1, 5), long, inside the map.
        y: Row of the cell, shape (L, N, M, 1, 5), long, inside the map.
        matched: Whether cell and anchor answer for the target, shape (L, N, M, A, 5), bool.
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
    """Find the cells and anchors that answer for each target, on all scales at once.

    Args:
        targets: The targets of the batch.
        anchors: Width and height of the anchors of each scale in pixels, shape (L, A, 2).
        strides: Pixels between the cells of each scale, shape (L,).
        rows: Of the map of each scale, shape (L,).
        columns: Likewise.
        max_ratio: An anchor fits when neither side is this many times the target's, nor the
            target's its own.
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
    """Whether a center is nearest to the neighbor on the side it is ``distance`` cells from."""
    return (distance % 1 < 0.5) & (distance > 1)


def _inside(place: Tensor, cells: Tensor) -> Tensor:
    """The index of the cell, of so many, that a place (L, N, M, 5) lies in or is nearest to."""
    return torch.minimum(place.long().clamp(min=0), cells[..., None].long() - 1)
