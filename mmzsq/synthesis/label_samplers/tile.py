# SPDX-License-Identifier: Apache-2.0
"""Labels on a grid with at most one object in each cell, as in tiled images.

The paper's Tile baseline (Table 5, after DIODE, Chawla et al. 2021) tiles single-object images on a canvas. Here only
the labels are tiled, and all cells of an image are synthesized together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.random_boxes import MultiBoxSampler, random_boxes


@LABEL_SAMPLERS.register_module()
class TileSampler(MultiBoxSampler):
    """Draws a random number of boxes for each image, of random class, with at most one box in each cell of a grid.

    The grid is square, and the smallest with a cell for each box. Empty cells are drawn at random.

    Args:
        num_boxes: Minimum and maximum number of boxes in an image; all numbers in between are equally likely.
        side: Range of the width and of the height of each box, drawn independently, as fractions of its cell's, in
            (0, 1].
        count_histogram: Replaces ``num_boxes``, see :class:`MultiBoxSampler`.

    Raises:
        UserError: If a range is empty or out of bounds, or the histogram is not a list of valid weights.

    Example:
        >>> [labels] = TileSampler(num_boxes=(2, 2)).sample(1, (160, 160), 80, torch.Generator().manual_seed(0))
        >>> centers = (labels.bboxes[:, :2] + labels.bboxes[:, 2:]) / 2
        >>> (centers / 80).floor()  # Column and row of each box in a grid of 2 x 2.
        tensor([[1., 1.],
                [0., 0.]])
    """

    def __init__(
        self,
        num_boxes: Sequence[int] = (1, 9),
        side: Sequence[float] = (0.2, 0.8),
        count_histogram: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_boxes, side, count_histogram)

    def _draw_boxes(self, counts: list[int], image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        in_cell = random_boxes(sum(counts), image_size, self.side, generator)
        rows = torch.tensor([math.isqrt(count - 1) + 1 for count in counts])
        cells = torch.cat(
            [torch.randperm(int(n) ** 2, generator=generator)[:count] for n, count in zip(rows, counts, strict=True)]
        )
        rows = rows.repeat_interleave(torch.tensor(counts))
        place = torch.stack([cells % rows, cells // rows], dim=1).repeat(1, 2)
        height, width = image_size
        pixels = torch.tensor([width, height, width, height])
        return (in_cell + place * pixels) / rows[:, None]
