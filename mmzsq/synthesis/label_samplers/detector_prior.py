# SPDX-License-Identifier: Apache-2.0
"""Labels as frequent, and as large, as those that the detector was trained on, so far as its weights tell.

No data is read. A head that was trained on many more persons than toasters gives persons the higher logit where its
features say nothing: the biases of its last layer hold the histogram of the categories. And YOLO's anchors are clusters
of the sizes of the training boxes. On YOLOv5-n such categories correlate with COCO's to 0.95 (Pearson's, of the numbers
of boxes); labels drawn evenly do not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.base import checked_number
from mmzsq.synthesis.label_samplers.random_boxes import MultiBoxSampler, draw_bins, place_boxes


@dataclass(frozen=True)
class LabelPrior:
    """What a detector's weights tell of the labels that it was trained on.

    Attributes:
        categories: Weight of each category, (C,), positive; None if the detector tells nothing.
        sizes: Widths and heights in pixels, all equally likely, (K, 2); None likewise.
    """

    categories: Tensor | None
    sizes: Tensor | None


@LABEL_SAMPLERS.register_module()
class DetectorPriorSampler(MultiBoxSampler):
    """A random number of boxes an image, of categories and sizes as the detector's weights tell of its training.

    Boxes lie anywhere, and may overlap. Where the weights tell nothing of categories or of sizes, these are drawn as
    :class:`MultiBoxSampler` draws them.

    Args:
        num_boxes: Fewest and most boxes of an image; every number between is equally likely.
        power: Of the weights of the categories, in [0, 1]: 1 as the detector tells, 0 evenly.
        spread: Deviation of the logarithm of width and of height about those of an anchor, at least 0.
        side: Range of each box's width and height as shares of the image's, where the detector tells none.

    Raises:
        UserError: If an argument is out of range.
    """

    uses_detector_prior = True

    def __init__(
        self,
        num_boxes: Sequence[int] = (1, 15),
        power: float = 1.0,
        spread: float = 0.3,
        side: Sequence[float] = (0.05, 0.5),
    ) -> None:
        super().__init__(num_boxes=num_boxes, side=side)
        self.power = checked_number('DetectorPriorSampler: power', power, 0, 1)
        self.spread = checked_number('DetectorPriorSampler: spread', spread, 0, 10)
        self._prior: LabelPrior | None = None
        self._frame: tuple[int, int] = (0, 0)

    def set_label_prior(self, prior: LabelPrior, image_size: tuple[int, int]) -> None:
        """See :meth:`LabelSampler.set_label_prior`."""
        self._prior, self._frame = prior, image_size

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw labels; see :meth:`LabelSampler.sample`.

        Raises:
            UserError: Before :meth:`set_label_prior`.
        """
        if self._prior is None:
            raise UserError('DetectorPriorSampler has no detector yet: call set_label_prior() first')
        return super().sample(num_images, image_size, num_classes, generator)

    def _draw_labels(self, count: int, num_classes: int, generator: torch.Generator) -> Tensor:
        assert self._prior is not None
        if self._prior.categories is None:
            return super()._draw_labels(count, num_classes, generator)
        return draw_bins((self._prior.categories.double() ** self.power).tolist(), count, generator)

    def _draw_boxes(self, counts: list[int], image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
        assert self._prior is not None
        if self._prior.sizes is None:
            return super()._draw_boxes(counts, image_size, generator)
        sizes = self._prior.sizes
        chosen = sizes[torch.randint(len(sizes), (sum(counts),), generator=generator)]
        jitter = (self.spread * torch.randn(sum(counts), 2, generator=generator)).exp()
        share = chosen * jitter / torch.tensor([self._frame[1], self._frame[0]])
        pixel = torch.tensor([1 / image_size[1], 1 / image_size[0]])
        return place_boxes(share.clamp(max=1).maximum(pixel), image_size, generator)
