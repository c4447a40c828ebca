# SPDX-License-Identifier: Apache-2.0
"""Labels drawn blindly: boxes of random size, place and class.

:class:`SingleBoxSampler` is where the paper's adaptive sampling starts (Table 1),
:class:`MultiBoxSampler` its MultiSample baseline "out of distribution" (Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.base import LabelSampler, checked_range


def random_boxes(
    count: int,
    image_size: tuple[int, int],
    side: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes that lie inside the image.

    Args:
        count: How many.
        image_size: Height and width in pixels.
        side: Range of width and of height, each drawn uniformly, as shares of the image's.
        generator: A CPU generator.

    Returns:
        Boxes (count, 4), xyxy in pixels; each box's centre is uniform over where it can be.
    """
    size = side[0] + torch.rand(count, 2, generator=generator) * (side[1] - side[0])
    corner = torch.rand(count, 2, generator=generator) * (1 - size)
    height, width = image_size
    pixels = torch.tensor([width, height, width, height])
    return torch.cat([corner, corner + size], dim=1) * pixels


@LABEL_SAMPLERS.register_module()
class MultiBoxSampler(LabelSampler):
    """A random number of boxes an image, each of random class, size and place; they may overlap.

    Args:
        num_boxes: Fewest and most boxes of an image; every number between is equally likely.
        side: Range of each box's width and height, drawn apart, as shares of the image's, in (0,
            1].

    Raises:
        UserError: If a range is empty or out of bounds.
    """

    def __init__(self, num_boxes: Sequence[int] = (1, 10), side: Sequence[float] = (0.1, 0.5)) -> None:
        name = type(self).__name__
        low, high = checked_range(f'{name}: num_boxes', num_boxes, 1, math.inf)
        if not isinstance(low, int) or not isinstance(high, int):
            raise UserError(f'{name}: num_boxes must be two integers, got {num_boxes!r}')
        self.num_boxes = (low, high)
        self.side = checked_range(f'{name}: side', side, 0, 1)
        if self.side[0] == 0:
            raise UserError(f'{name}: side must start above 0, got {side!r}')

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw labels; see :meth:`LabelSampler.sample`."""
        low, high = self.num_boxes
        counts = torch.randint(low, high + 1, (num_images,), generator=generator).tolist()
        bboxes = random_boxes(sum(counts), image_size, self.side, generator)
        labels = torch.randint(num_classes, (sum(counts),), generator=generator)
        return [
            InstanceData(bboxes=boxes, labels=classes)
            for boxes, classes in zip(bboxes.split(counts), labels.split(counts), strict=True)
        ]


@LABEL_SAMPLERS.register_module()
class SingleBoxSampler(MultiBoxSampler):
    """One box an image, of random class, size and place.

    Args:
        side: Range of its width and height, drawn apart, as shares of the image's, in (0, 1].

    Raises:
        UserError: If the range is empty or out of bounds.

    Example:
        >>> labels = SingleBoxSampler().sample(2, (160, 160), 80, torch.Generator().manual_seed(0))
        >>> [len(instances) for instances in labels]
        [1, 1]
    """

    def __init__(self, side: Sequence[float] = (0.2, 0.8)) -> None:
        super().__init__(num_boxes=(1, 1), side=side)
