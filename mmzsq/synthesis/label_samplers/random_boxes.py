# SPDX-License-Identifier: Apache-2.0
"""Random labels: boxes of random size, position and class.

:class:`SingleBoxSampler` draws the initial labels of the paper's adaptive sampling (Table 1). :class:`MultiBoxSampler`
is its MultiSample baseline (Table 5): "out of distribution" by default, and "in distribution" with histograms of a real
data set, as written by ``tools/analysis_tools/label_statistics.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.argument_checks import checked_histogram, checked_range
from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.base import LabelSampler


def random_boxes(
    count: int,
    image_size: tuple[int, int],
    side: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes that lie inside the image.

    Args:
        count: Number of boxes.
        image_size: Height and width in pixels.
        side: Range of the width and of the height, each drawn uniformly, as fractions of the image's.
        generator: A CPU generator.

    Returns:
        Boxes (count, 4), xyxy in pixels; centers are uniform over all positions that keep the box inside.
    """
    size = side[0] + torch.rand(count, 2, generator=generator) * (side[1] - side[0])
    return place_boxes(size, image_size, generator)


def boxes_from_size_histogram(
    count: int,
    image_size: tuple[int, int],
    histogram: Sequence[float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes that lie inside the image and whose sizes follow a histogram.

    Args:
        count: Number of boxes.
        image_size: Height and width in pixels.
        histogram: Weights of size bins of equal width over (0, 1]. The size of a box is the square root of its area as
            a fraction of the image area; it is uniform within a bin.
        ratio: Range of width to height, both as fractions of the image's, drawn log-uniformly from the part of the
            range for which the box fits into the image.
        generator: A CPU generator.

    Returns:
        Boxes (count, 4), xyxy in pixels, at least one pixel wide and high; centers are uniform over all positions that
        keep the box inside.
    """
    bins = draw_bins(histogram, count, generator)
    size = (bins + 1 - torch.rand(count, generator=generator)) / len(histogram)
    # Outside of these bounds a side would be longer than the image's.
    low, high = (torch.full_like(size, bound).clamp(size**2, size**-2).log() for bound in ratio)
    root = ((low + torch.rand(count, generator=generator) * (high - low)) / 2).exp()
    height, width = image_size
    pixel = torch.tensor([1 / width, 1 / height])
    return place_boxes(
        torch.stack([size * root, size / root], dim=1).clamp(max=1).maximum(pixel), image_size, generator
    )


def place_boxes(size: Tensor, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Place boxes uniformly inside an image.

    Args:
        size: Widths and heights (n, 2), as fractions of the image's.
        image_size: Height and width in pixels.
        generator: A CPU generator.

    Returns:
        Boxes (n, 4), xyxy in pixels.
    """
    corner = torch.rand(len(size), 2, generator=generator) * (1 - size)
    height, width = image_size
    pixels = torch.tensor([width, height, width, height])
    return torch.cat([corner, corner + size], dim=1) * pixels


def draw_bins(histogram: Sequence[float], count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` bins of a histogram, (count,) int64, in proportion to their weights."""
    weights = torch.tensor(histogram, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


@LABEL_SAMPLERS.register_module()
class MultiBoxSampler(LabelSampler):
    """Draws a random number of boxes for each image, of random class, size and position; they may overlap.

    Args:
        num_boxes: Minimum and maximum number of boxes in an image; all numbers in between are equally likely.
        side: Range of the width and of the height of each box, drawn independently, as fractions of the image's, in
            (0, 1].
        count_histogram: Replaces ``num_boxes``: weights of one, two, three, ... boxes in an image. The sampler reads no
            real label, but a histogram of a real data set makes the labels the paper's "in distribution" setting, which
            uses more knowledge than a label-free run.
        size_histogram: Replaces ``side``: weights of box sizes, see :func:`boxes_from_size_histogram`.
        ratio: With ``size_histogram``, the range of width to height, both as fractions of the image's, in (0, inf).

    Raises:
        UserError: If a range is empty or out of bounds, or a histogram is not a list of valid weights.

    Example:
        >>> sampler = MultiBoxSampler(count_histogram=[0, 1])
        >>> [len(instances) for instances in sampler.sample(3, (160, 160), 80, torch.Generator())]
        [2, 2, 2]
    """

    def __init__(
        self,
        num_boxes: Sequence[int] = (1, 10),
        side: Sequence[float] = (0.1, 0.5),
        count_histogram: Sequence[float] | None = None,
        size_histogram: Sequence[float] | None = None,
        ratio: Sequence[float] = (0.5, 2.0),
    ) -> None:
        name = type(self).__name__
        low, high = checked_range(f'{name}: num_boxes', num_boxes, 1)
        if not isinstance(low, int) or not isinstance(high, int):
            raise UserError(f'{name}: num_boxes must be two integers, got {num_boxes!r}')
        self.num_boxes = (low, high)
        self.side = checked_range(f'{name}: side', side, 0, 1)
        if self.side[0] == 0:
            raise UserError(f'{name}: side must start above 0, got {side!r}')
        self.count_histogram = checked_histogram(f'{name}: count_histogram', count_histogram)
        self.size_histogram = checked_histogram(f'{name}: size_histogram', size_histogram)
        self.ratio = checked_range(f'{name}: ratio', ratio, 0)
        if self.ratio[0] == 0:
            raise UserError(f'{name}: ratio must start above 0, got {ratio!r}')

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw labels; see :meth:`LabelSampler.sample`."""
        counts = self._draw_counts(num_images, generator)
        bboxes = self._draw_boxes(counts, image_size, generator)
        labels = self._draw_labels(sum(counts), num_classes, generator)
        return [
            InstanceData(bboxes=boxes, labels=classes)
            for boxes, classes in zip(bboxes.split(counts), labels.split(counts), strict=True)
        ]

    def _draw_labels(self, count: int, num_classes: int, generator: torch.Generator) -> Tensor:
        return torch.randint(num_classes, (count,), generator=generator)

    def _draw_counts(self, num_images: int, generator: torch.Generator) -> list[int]:
        if self.count_histogram is not None:
            return (draw_bins(self.count_histogram, num_images, generator) + 1).tolist()
        low, high = self.num_boxes
        return torch.randint(low, high + 1, (num_images,), generator=generator).tolist()

    def _draw_boxes(self, counts: list[int], image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw ``counts`` boxes for each image; shape (sum of counts, 4), xyxy in pixels."""
        if self.size_histogram is not None:
            return boxes_from_size_histogram(sum(counts), image_size, self.size_histogram, self.ratio, generator)
        return random_boxes(sum(counts), image_size, self.side, generator)


@LABEL_SAMPLERS.register_module()
class SingleBoxSampler(MultiBoxSampler):
    """Draws one box for each image, of random class, size and position.

    Args:
        side: Range of the width and of the height, drawn independently, as fractions of the image's, in (0, 1].

    Raises:
        UserError: If the range is empty or out of bounds.

    Example:
        >>> labels = SingleBoxSampler().sample(2, (160, 160), 80, torch.Generator().manual_seed(0))
        >>> [len(instances) for instances in labels]
        [1, 1]
    """

    def __init__(self, side: Sequence[float] = (0.2, 0.8)) -> None:
        super().__init__(num_boxes=(1, 1), side=side)
