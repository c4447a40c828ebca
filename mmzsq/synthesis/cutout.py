# SPDX-License-Identifier: Apache-2.0
"""Cutout augmentation of the detector's input during synthesis; the optimized images stay unchanged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmzsq.synthesis.config import CutoutConfig


class Cutout:
    """Random erasing (Zhong et al. 2020) of one rectangle in each image, drawn again in each step.

    Random numbers come from PyTorch's default generator of the images' device, so a captured step draws new ones.

    Args:
        probability: Probability that an image is erased, in [0, 1].
        area: Range of the erased fraction of the image area, in (0, 1].
        ratio: Range of height over width, drawn log-uniformly.
        value: Fill value in [0, 1], or ``'mean'`` for the mean color of each image. The authors fill with black. In
            batch statistics a black rectangle is an outlier, especially if the images are bright and smooth. Images
            that match the running statistics of BatchNorm then lose their own contrast.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        probability: float = 0.5,
        area: tuple[float, float] = (0.02, 0.2),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float | str = 0.0,
    ) -> None:
        settings = dict(probability=probability, area=area, ratio=ratio, value=value)
        config = CutoutConfig.parse(settings, 'zsq.synthesis.cutout')
        self.probability = config.probability
        self.area = config.area
        self.log_ratio = (math.log(config.ratio[0]), math.log(config.ratio[1]))
        self.value: Any = config.value

    def __call__(self, images: Tensor) -> Tensor:
        """Erase a rectangle in some images (N, 3, H, W); erased pixels get no gradient."""
        count, _, height, width = images.shape
        draw = torch.rand(5, count, device=images.device)
        area = (self.area[0] + draw[0] * (self.area[1] - self.area[0])) * height * width
        ratio = torch.exp(self.log_ratio[0] + draw[1] * (self.log_ratio[1] - self.log_ratio[0]))
        box_height = (area * ratio).sqrt().round().clamp(max=height)
        box_width = (area / ratio).sqrt().round().clamp(max=width)
        top = (draw[2] * (height - box_height + 1)).floor()
        left = (draw[3] * (width - box_width + 1)).floor()
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
        erased = in_rows[:, :, None] & in_columns[:, None, :] & (draw[4] < self.probability)[:, None, None]
        fill = images.detach().mean((2, 3), keepdim=True) if self.value == 'mean' else self.value
        # masked_fill would change the channels_last layout of the images, and so that of all features.
        return torch.where(erased[:, None], fill, images)
