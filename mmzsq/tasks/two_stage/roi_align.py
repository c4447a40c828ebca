# SPDX-License-Identifier: Apache-2.0
"""RoIAlign (He et al. 2017, arXiv:1703.06870) over all levels of a feature pyramid at once, with fixed shapes.

Sampling is separable. For each box, the rows and columns that its sampling points touch are gathered as one block, by
advanced indexing into the concatenated maps of all levels. Two small matrix products then average the block.

Compared to torchvision's operator, the backward sums in a fixed order (advanced indexing does, atomic additions do
not), boxes are not split by level (which would make the host wait for the device), and bf16 is supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PyramidLayout(NamedTuple):
    """Positions of the L levels' maps in the matrix that :func:`flatten_pyramid` returns.

    Attributes:
        scales: Cells per image pixel, (L,).
        heights: Number of rows of each map, (L,), long.
        widths: Number of columns of each map, (L,), long.
        starts: First row of each level in the matrix, (L,), long.
    """

    scales: Tensor
    heights: Tensor
    widths: Tensor
    starts: Tensor

    @classmethod
    def build(
        cls, map_sizes: Sequence[tuple[int, int]], scales: Sequence[float], num_images: int, device: torch.device
    ) -> PyramidLayout:
        """Compute the layout.

        Args:
            map_sizes: Rows and columns of the map of each level.
            scales: Cells per image pixel of each level.
            num_images: Number of images N.
            device: Device of the tensors.
        """
        heights, widths = torch.tensor(map_sizes, device=device).unbind(1)
        cells = num_images * heights * widths
        return cls(torch.tensor(scales, device=device), heights, widths, cells.cumsum(0) - cells)


def flatten_pyramid(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (N, C, H, W) of several sizes to a matrix (sum of N*H*W, C) with one row per cell.

    Example:
        >>> flatten_pyramid([torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]).shape
        torch.Size([40, 8])
    """
    return torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in maps])


def roi_align(
    rows: Tensor,
    levels: PyramidLayout,
    images: Tensor,
    level: Tensor,
    bboxes: Tensor,
    output_size: tuple[int, int],
    samples: int,
    aligned: bool = True,
) -> Tensor:
    """Average the features in each bin of each box over bilinearly interpolated sampling points.

    Differentiable with respect to ``rows``.

    Args:
        rows: Features of all levels as :func:`flatten_pyramid` returns them, (rows, C). Integers are read as float32.
        levels: Layout of the levels in ``rows``.
        images: Image index of each box, (R,), long.
        level: Level index of each box, (R,), long.
        bboxes: Boxes in xyxy image pixels, (R, 4), float32.
        output_size: Number of bins in y and in x.
        samples: Sampling points per bin and axis.
        aligned: Whether pixel centers are at half-integer coordinates; False uses integer coordinates, as detectors
            before Detectron2 did.

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
    """Return the cells that boxes read along one axis, and their weights in each bin.

    Args:
        low: Start of each box in cells, (R,).
        high: End of each box in cells, (R,).
        length: Number of cells of the axis, (R,), long.
        bins: Number of bins B.
        samples: Sampling points per bin S.
        aligned: See :func:`roi_align`.

    Returns:
        Cell indices (R, B*S*2), with the two neighbors of each point side by side, and weights (R, B, B*S*2).
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
    # Beyond the center of the last cell, both neighbors are that cell and any shares that sum to 1 are correct.
    share = point - cell
    neighbors = torch.stack((cell, torch.minimum(cell + 1, last)), dim=-1)
    shares = torch.stack((1 - share, share), dim=-1) * (inside / samples)[..., None]
    own_bin = torch.eye(bins, device=low.device)[:, :, None]
    return neighbors.flatten(1), (shares.view(len(low), bins, 1, -1) * own_bin).flatten(2)
