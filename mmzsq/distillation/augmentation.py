# SPDX-License-Identifier: Apache-2.0
"""Other views of synthetic images, for teacher and student alike, made on the device a batch at a time.

A calibration set is small and has a look of its own, which a student learns by heart. Distillation needs no labels: the
teacher says of every image what is in it, of a mirrored, tiled or tinted one too. All choices are tensors, so that a
captured training step makes new ones each time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.errors import UserError, check_keys

KEYS = ('flip', 'mosaic', 'color')


class BatchAugmentation(nn.Module):
    """Mirrors, tiles and tints images at random, each apart from the others.

    Args:
        flip: Probability that an image is mirrored left to right.
        mosaic: Probability that an image makes room for four of the batch, itself and the next three, at half their
            size: four times the objects, half as large.
        color: Largest change of each color channel's gain, as a logarithm: 0.3 is a factor from 0.74 to 1.35.

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(self, flip: float = 0.0, mosaic: float = 0.0, color: float = 0.0) -> None:
        super().__init__()
        for name, value, most in (('flip', flip, 1.0), ('mosaic', mosaic, 1.0), ('color', color, 2.0)):
            if not 0 <= value <= most:
                raise UserError(f'zsq.train.augmentation.{name} is a number from 0 to {most:g}, not {value!r}')
        self.flip = flip
        self.mosaic = mosaic
        self.color = color

    @classmethod
    def from_cfg(cls, cfg: dict[str, float] | None) -> BatchAugmentation | None:
        """Read the section ``zsq.train.augmentation``; None is no augmentation.

        Raises:
            UserError: If a key is unknown.
        """
        if cfg is None:
            return None
        check_keys(cfg, KEYS, 'zsq.train.augmentation')
        return cls(**cfg)

    def forward(self, inputs: Tensor, black: Tensor, white: Tensor) -> Tensor:
        """Return other views of a batch.

        Args:
            inputs: Images as the network takes them, (N, 3, H, W).
            black: What the darkest pixel is in ``inputs``, shape (3, 1, 1).
            white: The brightest, likewise.

        Returns:
            Images of the same shape, within black and white.
        """
        if self.flip:
            inputs = torch.where(_chosen(inputs, self.flip), inputs.flip(3), inputs)
        if self.mosaic:
            inputs = torch.where(_chosen(inputs, self.mosaic), mosaics(inputs), inputs)
        if self.color:
            spread = torch.rand(len(inputs), inputs.shape[1], 1, 1, device=inputs.device) * 2 - 1
            gain = (self.color * spread).exp().to(inputs.dtype)
            inputs = torch.minimum(black + (inputs - black) * gain, white)
        return inputs

    def extra_repr(self) -> str:
        """All settings."""
        return f'flip={self.flip}, mosaic={self.mosaic}, color={self.color}'


def mosaics(images: Tensor) -> Tensor:
    """For each image, itself and the next three of the batch in the quarters of one image.

    Args:
        images: Shape (N, C, H, W); the first follow the last.

    Returns:
        The same shape.
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


def _chosen(inputs: Tensor, probability: float) -> Tensor:
    """For each image True with that probability, (N, 1, 1, 1)."""
    return torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < probability
