# SPDX-License-Identifier: Apache-2.0
"""Labels like those of tiled images: a grid with one object in a cell.

The paper's Tile baseline (Table 5, after DIODE, Chawla et al. 2021) puts images of one object each side by side on a
canvas. Here the labels alone are laid out so, and all cells of an image are synthesized together.
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
    """A random number of boxes an image, each of random class and alone in a cell of a grid.

    The grid has as many rows as columns, the fewest that give each box a cell of its own. Which cells stay empty is
    drawn.

    Args:
        num_boxes: Fewest and most boxes of an image; every number between is equally likely.
        side: Range of each box's width and height, drawn apart, as shares of its cell's, in (0, 1].
        count_histogram: In place of ``num_boxes``, see :class:`MultiBoxSampler`.

    Raises:
        UserError: If a range is empty or out of bounds, or the histogram is none.

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
