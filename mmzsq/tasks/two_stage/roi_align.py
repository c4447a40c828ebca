# SPDX-License-Identifier: Apache-2.0
"""RoIAlign (He et al. 2017, arXiv:1703.06870) over all levels of a pyramid at once, with fixed shapes.

Sampling is separable: of every box, the rows and columns that its points touch are read as one block, by advanced
indexing into the maps of all levels laid one after the other, and two small matrix products average it. What the
usual operator lacks and synthesis needs: a backward that adds up in a fixed order (advanced indexing's; the usual one's
atomic additions do not), no split of the boxes by level, which waits for the device, and bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Where the maps of a pyramid's levels lie in the matrix that :func:`stack_rows` makes of them.

    Attributes:
        scales: Cells per pixel of the image, (L,).
        heights: Rows of a map, (L,), long.
        widths: Columns of a map, (L,), long.
        starts: Row of the matrix where a level begins, (L,), long.
    """

    scales: Tensor
    heights: Tensor
    widths: Tensor
    starts: Tensor

    @classmethod
    def of(
        cls, map_sizes: Sequence[tuple[int, int]], scales: Sequence[float], num_images: int, device: torch.device
    ) -> Levels:
        """Lay out maps of ``map_sizes`` (rows, columns), of ``num_images`` images each."""
        heights, widths = torch.tensor(map_sizes, device=device).unbind(1)
        cells = num_images * heights * widths
        return cls(torch.tensor(scales, device=device), heights, widths, cells.cumsum(0) - cells)


def stack_rows(maps: Sequence[Tensor]) -> Tensor:
    """Lay maps (N, C, H, W) of several sizes one after the other: (sum of N*H*W, C), a cell a row."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in maps])


def roi_align(
    rows: Tensor,
    levels: Levels,
    images: Tensor,
    level: Tensor,
    bboxes: Tensor,
    output_size: tuple[int, int],
    samples: int,
    aligned: bool = True,
) -> Tensor:
    """Average the features in each bin of each box, by bilinear interpolation at ``samples`` x ``samples`` points.

    Differentiable in ``rows``.

    Args:
        rows: Features of all levels as :func:`stack_rows` lays them, (rows, C); if not floating, read as float32.
        levels: Where they lie.
        images: Which image a box is of, (R,), long.
        level: Which level it reads, (R,), long.
        bboxes: xyxy in pixels of the image, (R, 4), float32.
        output_size: Bins in y and in x.
        samples: Points a bin and axis.
        aligned: Whether a cell's value stands at its center; False for its corner, as before Detectron2.

    Returns:
        Shape (R, C, *output_size).
    """
    scale, height, width = levels.scales[level], levels.heights[level], levels.widths[level]
    left, top, right, bottom = (bboxes * scale[:, None]).unbind(1)
    y, y_weights = _read_axis(top, bottom, height, output_size[0], samples, aligned)
    x, x_weights = _read_axis(left, right, width, output_size[1], samples, aligned)
    first = levels.starts[level] + images * height * width
    values = rows[first[:, None, None] + y[:, :, None] * width[:, None, None] + x[:, None, :]]
    if not values.is_floating_point():
        values = values.float()
    averaged = y_weights.to(values.dtype) @ values.flatten(2)
    averaged = x_weights.to(averaged.dtype)[:, None] @ averaged.unflatten(2, values.shape[2:])
    return averaged.permute(0, 3, 1, 2)


def _read_axis(
    low: Tensor, high: Tensor, length: Tensor, bins: int, samples: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Which cells of one axis boxes read, and how much of each goes into which bin.

    Args:
        low: Where boxes begin, in cells, (R,).
        high: Where they end, (R,).
        length: Cells of the axis, (R,), long.
        bins: Number of bins B.
        samples: Points a bin S.
        aligned: See :func:`roi_align`.

    Returns:
        Indices (R, B*S*2), each point's two neighbors side by side; weights (R, B, B*S*2).
    """
    extent = high - low if aligned else (high - low).clamp(min=1)
    start = low - 0.5 if aligned else low
    steps = (torch.arange(bins * samples, device=low.device, dtype=low.dtype) + 0.5) / (bins * samples)
    point = start[:, None] + extent[:, None] * steps
    length = length[:, None]
    inside = (point >= -1) & (point <= length)
    point = point.clamp(min=0)
    last = length - 1
    cell = torch.minimum(point.long(), last)
    # Beyond the last cell's center both neighbors are that cell, and the shares need only add up to 1.
    share = point - cell
    neighbors = torch.stack((cell, torch.minimum(cell + 1, last)), dim=-1)
    shares = torch.stack((1 - share, share), dim=-1) * (inside / samples)[..., None]
    own_bin = torch.eye(bins, device=low.device)[:, :, None]
    return neighbors.flatten(1), (shares.view(len(low), bins, 1, -1) * own_bin).flatten(2)
