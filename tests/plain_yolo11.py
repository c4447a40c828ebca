# SPDX-License-Identifier: Apache-2.0
"""A reference YOLO11 that is independent of the package and uses tensors under Ultralytics' names."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDES = (8, 16, 32)
BINS = 16


class PlainYOLO11:
    """Forward pass and decoding of YOLO11, written from its published layer table."""

    strides = STRIDES
    head = 'model.23'

    def __init__(self, depth: float, width: float, limit: int, nested: bool, classes: int) -> None:
        self.repeats = max(round(2 * depth), 1)
        self.width, self.limit, self.nested, self.classes = width, limit, nested, classes
        self.found: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return random tensors under the names and with the shapes of the size."""
        self.found = {f'{self.head}.dfl.conv.weight': torch.arange(float(BINS)).view(1, BINS, 1, 1)}
        self.forward(torch.zeros(1, 3, 32, 32))
        return self.found

    def channels(self, number: int) -> int:
        return math.ceil(min(number, self.limit) * self.width / 8) * 8

    def layer(self, x: Tensor, name: str, outputs: int, kernel: int = 1) -> Tensor:
        """Apply a convolution with a bias."""
        if f'{name}.weight' not in self.found:
            shape = (outputs, x.shape[1], kernel, kernel)
            self.found[f'{name}.weight'] = torch.randn(shape, device=x.device) * 0.1
            self.found[f'{name}.bias'] = torch.randn(outputs, device=x.device) * 0.1
        return F.conv2d(x, self.found[f'{name}.weight'].float(), self.found[f'{name}.bias'].float())

    def conv(
        self, x: Tensor, name: str, outputs: int, kernel: int = 1, stride: int = 1, each: bool = False, act: bool = True
    ) -> Tensor:
        """Apply a convolution, depthwise if ``each``, with batch norm and optionally SiLU."""
        groups = outputs if each else 1
        parts = ('weight', 'bias', 'running_mean', 'running_var')
        if f'{name}.conv.weight' not in self.found:
            inputs = x.shape[1] // groups
            weight = torch.randn(outputs, inputs, kernel, kernel, device=x.device) / (kernel * inputs**0.5)
            self.found[f'{name}.conv.weight'] = weight
            for part, spread, center in zip(parts, (0.5, 0.1, 0.1, 0.5), (1, 0, 0, 1), strict=True):
                self.found[f'{name}.bn.{part}'] = center + spread * (2 * torch.rand(outputs, device=x.device) - 1)
            self.found[f'{name}.bn.num_batches_tracked'] = torch.tensor(7, device=x.device)
        x = F.conv2d(x, self.found[f'{name}.conv.weight'].float(), None, stride, kernel // 2, 1, groups)
        scale, shift, mean, var = (self.found[f'{name}.bn.{part}'].float() for part in parts)
        x = F.batch_norm(x, mean, var, scale, shift, eps=1e-3)
        return x * x.sigmoid() if act else x

    def pair(self, x: Tensor, name: str, hidden: int) -> Tensor:
        return x + self.conv(self.conv(x, f'{name}.cv1', hidden, 3), f'{name}.cv2', x.shape[1], 3)

    def c3k2(self, x: Tensor, name: str, outputs: int, nested: bool, share: float = 0.5) -> Tensor:
        half = int(outputs * share)
        y = self.conv(x, f'{name}.cv1', 2 * half)
        parts = [y[:, :half], y[:, half:]]
        for index in range(self.repeats):
            block, y = f'{name}.m.{index}', parts[-1]
            if nested or self.nested:
                z = self.conv(y, f'{block}.cv1', half // 2)
                for inner in range(2):
                    z = self.pair(z, f'{block}.m.{inner}', half // 2)
                z = torch.cat((z, self.conv(y, f'{block}.cv2', half // 2)), 1)
                parts.append(self.conv(z, f'{block}.cv3', half))
            else:
                parts.append(self.pair(y, block, half // 2))
        return self.conv(torch.cat(parts, 1), f'{name}.cv2', outputs)

    def attention(self, x: Tensor, name: str) -> Tensor:
        """Apply attention in a loop over heads."""
        channels, cells = x.shape[1], x.shape[2] * x.shape[3]
        heads = channels // 64
        size = channels // heads
        qkv = self.conv(x, f'{name}.qkv', 2 * channels, act=False)
        outputs, values = [], []
        for part in qkv.chunk(heads, 1):
            q, k, v = part.flatten(2).split((size // 2, size // 2, size), 1)
            weights = torch.einsum('ncq,nck->nqk', q, k) / math.sqrt(size // 2)
            outputs.append(torch.einsum('nqk,nck->ncq', weights.exp() / weights.exp().sum(-1, keepdim=True), v))
            values.append(v)
        assert outputs[0].shape[-1] == cells
        value, output = (torch.cat(parts, 1).view_as(x) for parts in (values, outputs))
        output = output + self.conv(value, f'{name}.pe', channels, 3, each=True, act=False)
        return self.conv(output, f'{name}.proj', channels, act=False)

    def c2psa(self, x: Tensor, name: str) -> Tensor:
        half = x.shape[1] // 2
        y = self.conv(x, f'{name}.cv1', 2 * half)
        kept, y = y[:, :half], y[:, half:]
        for index in range(self.repeats):
            y = y + self.attention(y, f'{name}.m.{index}.attn')
            z = self.conv(y, f'{name}.m.{index}.ffn.0', 2 * half)
            y = y + self.conv(z, f'{name}.m.{index}.ffn.1', half, act=False)
        return self.conv(torch.cat((kept, y), 1), f'{name}.cv2', x.shape[1])

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
        y = self.conv(x8, 'model.9.cv1', c1024 // 2)
        pooled = [y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
        x10 = self.c2psa(self.conv(torch.cat(pooled, 1), 'model.9.cv2', c1024), 'model.10')
        x13 = self.c3k2(torch.cat((up(x10), x6), 1), 'model.13', c512, False)
        x16 = self.c3k2(torch.cat((up(x13), x4), 1), 'model.16', c256, False)
        x19 = torch.cat((self.conv(x16, 'model.17', c256, 3, 2), x13), 1)
        x19 = self.c3k2(x19, 'model.19', c512, False)
        x22 = torch.cat((self.conv(x19, 'model.20', c512, 3, 2), x10), 1)
        x22 = self.c3k2(x22, 'model.22', c1024, True)
        wide, narrow = max(c256, min(self.classes, 100)), max(c256 // 4, 64)
        maps = []
        for index, x in enumerate((x16, x19, x22)):
            box, cls = f'model.23.cv2.{index}', f'model.23.cv3.{index}'
            y = self.conv(self.conv(x, f'{box}.0', narrow, 3), f'{box}.1', narrow, 3)
            z = self.conv(self.conv(x, f'{cls}.0.0', x.shape[1], 3, each=True), f'{cls}.0.1', wide)
            z = self.conv(self.conv(z, f'{cls}.1.0', wide, 3, each=True), f'{cls}.1.1', wide)
            maps.append(torch.cat((self.layer(y, f'{box}.2', 4 * BINS), self.layer(z, f'{cls}.2', self.classes)), 1))
        return maps

    @staticmethod
    def decode(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes (N, P, 4) in xyxy format and class scores (N, P, C), in a loop over locations."""
        bboxes, scores = [], []
        for level, stride in zip(maps, STRIDES, strict=True):
            rows, columns = level.shape[2:]
            for row in range(rows):
                for column in range(columns):
                    logits = level[:, :, row, column]
                    left, top, right, bottom = (
                        sum(bin_ * side.softmax(-1)[:, bin_] for bin_ in range(BINS))
                        for side in logits[:, : 4 * BINS].chunk(4, 1)
                    )
                    x, y = column + 0.5, row + 0.5
                    bboxes.append(torch.stack((x - left, y - top, x + right, y + bottom), -1) * stride)
                    scores.append(logits[:, 4 * BINS :].sigmoid())
        return torch.stack(bboxes, 1), torch.stack(scores, 1)
