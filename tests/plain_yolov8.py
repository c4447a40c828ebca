# SPDX-License-Identifier: Apache-2.0
"""A reference YOLOv8 that is independent of the package and uses tensors under Ultralytics' names."""

from __future__ import annotations

import torch
from plain_yolo11 import BINS, PlainYOLO11
from torch import Tensor
from torch.nn import functional as F


class PlainYOLOv8(PlainYOLO11):
    """Forward pass of YOLOv8, written from its published layer table. Decoding is that of YOLO11."""

    head = 'model.22'

    def __init__(self, depth: float, width: float, limit: int, classes: int) -> None:
        super().__init__(depth, width, limit, False, classes)
        self.three, self.six = (max(round(count * depth), 1) for count in (3, 6))

    def c2f(self, x: Tensor, name: str, outputs: int, repeats: int, residual: bool) -> Tensor:
        parts = list(self.conv(x, f'{name}.cv1', outputs).split(outputs // 2, 1))
        for index in range(repeats):
            y, block = parts[-1], f'{name}.m.{index}'
            z = self.conv(self.conv(y, f'{block}.cv1', outputs // 2, 3), f'{block}.cv2', outputs // 2, 3)
            parts.append(y + z if residual else z)
        return self.conv(torch.cat(parts, 1), f'{name}.cv2', outputs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the raw maps of RGB images in [0, 1]."""
        c64, c128, c256, c512, c1024 = (self.channels(c) for c in (64, 128, 256, 512, 1024))

        def up(x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

        def neck(parts: tuple[Tensor, Tensor], layer: int, outputs: int) -> Tensor:
            return self.c2f(torch.cat(parts, 1), f'model.{layer}', outputs, self.three, False)

        x = self.conv(images, 'model.0', c64, 3, 2)
        x = self.c2f(self.conv(x, 'model.1', c128, 3, 2), 'model.2', c128, self.three, True)
        x4 = self.c2f(self.conv(x, 'model.3', c256, 3, 2), 'model.4', c256, self.six, True)
        x6 = self.c2f(self.conv(x4, 'model.5', c512, 3, 2), 'model.6', c512, self.six, True)
        x8 = self.c2f(self.conv(x6, 'model.7', c1024, 3, 2), 'model.8', c1024, self.three, True)
        y = self.conv(x8, 'model.9.cv1', c1024 // 2)
        x9 = self.conv(torch.cat([y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)], 1), 'model.9.cv2', c1024)
        x12 = neck((up(x9), x6), 12, c512)
        x15 = neck((up(x12), x4), 15, c256)
        x18 = neck((self.conv(x15, 'model.16', c256, 3, 2), x12), 18, c512)
        x21 = neck((self.conv(x18, 'model.19', c512, 3, 2), x9), 21, c1024)
        wide, narrow = max(c256, min(self.classes, 100)), max(c256 // 4, 64)
        maps = []
        for index, x in enumerate((x15, x18, x21)):
            box, cls = f'{self.head}.cv2.{index}', f'{self.head}.cv3.{index}'
            y = self.conv(self.conv(x, f'{box}.0', narrow, 3), f'{box}.1', narrow, 3)
            z = self.conv(self.conv(x, f'{cls}.0', wide, 3), f'{cls}.1', wide, 3)
            maps.append(torch.cat((self.layer(y, f'{box}.2', 4 * BINS), self.layer(z, f'{cls}.2', self.classes)), 1))
        return maps
