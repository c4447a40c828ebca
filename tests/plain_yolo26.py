# SPDX-License-Identifier: Apache-2.0
"""A reference YOLO26 that is independent of the package and uses tensors under Ultralytics' names."""

from __future__ import annotations

import torch
from plain_yolo11 import STRIDES, PlainYOLO11
from torch import Tensor
from torch.nn import functional as F

BRANCHES = (('cv2', 'cv3'), ('one2one_cv2', 'one2one_cv3'))
"""The branch that only training uses, and the one whose maps are returned."""


class PlainYOLO26(PlainYOLO11):
    """Forward pass and decoding of YOLO26, written from its published layer table."""

    def tensors(self) -> dict[str, Tensor]:
        """Return random tensors under the names and with the shapes of the size, both branches of the head included."""
        self.found = {}
        self.forward(torch.zeros(1, 3, 32, 32))
        return self.found

    def attentive(self, x: Tensor, name: str, outputs: int) -> Tensor:
        """Apply the block with a single bottleneck and attention."""
        half = outputs // 2
        kept, y = self.conv(x, f'{name}.cv1', outputs).split(half, 1)
        z = self.pair(y, f'{name}.m.0.0', half // 2)
        z = z + self.attention(z, f'{name}.m.0.1.attn')
        z = z + self.conv(self.conv(z, f'{name}.m.0.1.ffn.0', outputs), f'{name}.m.0.1.ffn.1', half, act=False)
        return self.conv(torch.cat((kept, y, z), 1), f'{name}.cv2', outputs)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the raw maps of RGB images in [0, 1]."""
        c64, c128, c256, c512, c1024 = (self.channels(c) for c in (64, 128, 256, 512, 1024))

        def up(x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

        x = self.conv(images, 'model.0', c64, 3, 2)
        x = self.c3k2(self.conv(x, 'model.1', c128, 3, 2), 'model.2', c256, False, 0.25)
        x4 = self.c3k2(self.conv(x, 'model.3', c256, 3, 2), 'model.4', c512, False, 0.25)
        x6 = self.c3k2(self.conv(x4, 'model.5', c512, 3, 2), 'model.6', c512, True)
        x8 = self.c3k2(self.conv(x6, 'model.7', c1024, 3, 2), 'model.8', c1024, True)
        y = self.conv(x8, 'model.9.cv1', c1024 // 2, act=False)
        pooled = [y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
        x10 = self.c2psa(x8 + self.conv(torch.cat(pooled, 1), 'model.9.cv2', c1024), 'model.10')
        x13 = self.c3k2(torch.cat((up(x10), x6), 1), 'model.13', c512, True)
        x16 = self.c3k2(torch.cat((up(x13), x4), 1), 'model.16', c256, True)
        x19 = torch.cat((self.conv(x16, 'model.17', c256, 3, 2), x13), 1)
        x19 = self.c3k2(x19, 'model.19', c512, True)
        x22 = torch.cat((self.conv(x19, 'model.20', c512, 3, 2), x10), 1)
        x22 = self.attentive(x22, 'model.22', c1024)
        wide, narrow = max(c256, min(self.classes, 100)), max(c256 // 4, 16)
        maps = []
        for boxes, classes in BRANCHES:
            maps = []
            for index, x in enumerate((x16, x19, x22)):
                box, cls = f'{self.head}.{boxes}.{index}', f'{self.head}.{classes}.{index}'
                y = self.conv(self.conv(x, f'{box}.0', narrow, 3), f'{box}.1', narrow, 3)
                z = self.conv(self.conv(x, f'{cls}.0.0', x.shape[1], 3, each=True), f'{cls}.0.1', wide)
                z = self.conv(self.conv(z, f'{cls}.1.0', wide, 3, each=True), f'{cls}.1.1', wide)
                maps.append(torch.cat((self.layer(y, f'{box}.2', 4), self.layer(z, f'{cls}.2', self.classes)), 1))
        return maps

    @staticmethod
    def decode(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (N, P, 4) in xyxy format and class scores (N, P, C), in a loop over locations."""
        bboxes, scores = [], []
        for level, stride in zip(maps, STRIDES, strict=True):
            for row in range(level.shape[2]):
                for column in range(level.shape[3]):
                    left, top, right, bottom = level[:, :4, row, column].unbind(1)
                    x, y = column + 0.5, row + 0.5
                    bboxes.append(torch.stack((x - left, y - top, x + right, y + bottom), -1) * stride)
                    scores.append(level[:, 4:, row, column].sigmoid())
        return torch.stack(bboxes, 1), torch.stack(scores, 1)
