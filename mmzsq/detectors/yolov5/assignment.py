# SPDX-License-Identifier: Apache-2.0
"""Which cells and anchors of YOLOv5 answer for which target, for a whole batch at once.

A target fits an anchor whose sides differ from its own by a factor below a threshold. It is
answered for by the cell that holds its centre and by the nearest neighbours along x and along y.
Every target therefore has at most A * 5 candidates on a scale; all are kept, with a mask, so that
shapes depend on nothing but the padded length and no step waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.detectors.targets import PaddedTargets


class Candidates(NamedTuple):
    """The cells that may answer for each target on one scale.

    The last dimension is the cell of the centre, then its neighbour left, up, right and down.

    Attributes:
        x: Column of the cell, shape (N, M, 1, 5), long, inside the map.
        y: Row of the cell, shape (N, M, 1, 5), long, inside the map.
        matched: Whether cell and anchor answer for the target, shape (N, M, A, 5), bool.
    """

    x: Tensor
    y: Tensor
    matched: Tensor


def find_candidates(
    targets: PaddedTargets,
    anchors: Tensor,
    stride: int,
    map_size: tuple[int, int],
    max_ratio: float,
) -> Candidates:
    """Find the cells and anchors of one scale that answer for each target.

    Args:
        targets: The targets of the batch.
        anchors: Width and height of the scale's anchors in pixels, shape (A, 2).
        stride: Pixels between the cells of the scale.
        map_size: Rows and columns of the scale.
        max_ratio: An anchor fits when neither side is this many times the target's, nor the
            target's its own.
    """
    rows, columns = map_size
    low, high = targets.bboxes.float().chunk(2, dim=-1)
    x, y = ((low + high) / (2 * stride)).unbind(-1)
    ratio = (high - low)[:, :, None] / anchors
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < max_ratio
    near = torch.stack(
        (
            torch.ones_like(targets.valid),
            _is_near_edge(x),
            _is_near_edge(y),
            _is_near_edge(columns - x),
            _is_near_edge(rows - y),
        ),
        dim=-1,
    )
    cell_x = torch.stack((x, x - 0.5, x, x + 0.5, x), dim=-1).long().clamp(0, columns - 1)
    cell_y = torch.stack((y, y, y - 0.5, y, y + 0.5), dim=-1).long().clamp(0, rows - 1)
    matched = targets.valid[:, :, None, None] & fits[..., None] & near[:, :, None]
    return Candidates(cell_x[:, :, None], cell_y[:, :, None], matched)


def _is_near_edge(distance: Tensor) -> Tensor:
    """Whether a centre is nearest to the neighbour on the side it is ``distance`` cells from."""
    return (distance % 1 < 0.5) & (distance > 1)
