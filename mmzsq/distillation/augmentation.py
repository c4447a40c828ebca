# SPDX-License-Identifier: Apache-2.0
"""Augmentation of batches of synthetic images on the device, the same for teacher and student.

A calibration set is small, and a student overfits to it. Distillation needs no labels, because the teacher also
predicts on mirrored, tiled and tinted images. All random choices are tensors, so that a captured training step draws
new ones at each replay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.distillation.config import AugmentationConfig


class BatchAugmentation(nn.Module):
    """Mirrors, tiles and tints each image at random, independently of the others.

    Args:
        flip: Probability that an image is mirrored left to right.
        mosaic: Probability that an image is replaced by a mosaic of four images of the batch, itself and the next
            three, at half their size: four times as many objects, half as large.
        color: Maximum absolute logarithm of each color channel's gain: 0.3 means a factor from 0.74 to 1.35.

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(self, flip: float = 0.0, mosaic: float = 0.0, color: float = 0.0) -> None:
        super().__init__()
        config = AugmentationConfig.parse(dict(flip=flip, mosaic=mosaic, color=color), 'zsq.train.augmentation')
        self.flip = config.flip
        self.mosaic = config.mosaic
        self.color = config.color

    @classmethod
    def from_cfg(cls, cfg: dict[str, float] | None) -> BatchAugmentation | None:
        """Build from the section ``zsq.train.augmentation``; None means no augmentation.

        Raises:
            UserError: If a key is unknown or a value is not allowed.
        """
        return None if cfg is None else cls(**vars(AugmentationConfig.parse(cfg, 'zsq.train.augmentation')))

    def forward(self, inputs: Tensor, black: Tensor, white: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            inputs: Normalized images, (N, 3, H, W).
            black: Normalized value of the darkest pixel, (3, 1, 1).
            white: Normalized value of the brightest pixel, (3, 1, 1).

        Returns:
            Images of the same shape, between ``black`` and ``white``.
        """
        if self.flip:
            inputs = torch.where(_draw_mask(inputs, self.flip), inputs.flip(3), inputs)
        if self.mosaic:
            inputs = torch.where(_draw_mask(inputs, self.mosaic), mosaics(inputs), inputs)
        if self.color:
            spread = torch.rand(len(inputs), inputs.shape[1], 1, 1, device=inputs.device) * 2 - 1
            gain = (self.color * spread).exp().to(inputs.dtype)
            inputs = torch.minimum(black + (inputs - black) * gain, white)
        return inputs

    def extra_repr(self) -> str:
        """Show all settings."""
        return f'flip={self.flip}, mosaic={self.mosaic}, color={self.color}'


def mosaics(images: Tensor) -> Tensor:
    """Tile each image and the next three of the batch into the quarters of one image.

    Args:
        images: Shape (N, C, H, W). The first images follow the last one.

    Returns:
        Mosaics, (N, C, H, W).
    """
    height, width = images.shape[2:]
    rows = []
    for first, count in ((0, height // 2), (2, height - height // 2)):
        sides = (width // 2, width - width // 2)
        quarters = [
            F.interpolate(images.roll(-(first + index), 0), (count, side), mode='bilinear', antialias=True)
            for index, side in enumerate(sides)
        ]
        rows.append(torch.cat(quarters, 3))
    return torch.cat(rows, 2)


def _draw_mask(inputs: Tensor, probability: float) -> Tensor:
    """Draw a Boolean mask of the images, (N, 1, 1, 1), True with the given probability."""
    return torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < probability
