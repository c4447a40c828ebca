# SPDX-License-Identifier: Apache-2.0
"""A reference YOLOv5 that is independent of the package and uses tensors under Ultralytics' names."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDES = (8, 16, 32)
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


class PlainYOLOv5:
    """Forward pass and decoding of YOLOv5 v6.0, written from its published layer table."""

    anchors = ANCHORS
    strides = STRIDES

    @staticmethod
    def tensors(width: float = 0.25, depth: float = 0.33, classes: int = 3) -> dict[str, Tensor]:
        """Return random tensors under the names and with the shapes of a size."""
        found: dict[str, Tensor] = {}

        def channels(number: int) -> int:
            return math.ceil(number * width / 8) * 8

        def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
            found[f'{name}.conv.weight'] = torch.randn(outputs, inputs, kernel, kernel) / (kernel * inputs**0.5)
            found[f'{name}.bn.weight'] = torch.rand(outputs) + 0.5
            found[f'{name}.bn.bias'] = torch.randn(outputs) * 0.1
            found[f'{name}.bn.running_mean'] = torch.randn(outputs) * 0.1
            found[f'{name}.bn.running_var'] = torch.rand(outputs) + 0.5
            found[f'{name}.bn.num_batches_tracked'] = torch.tensor(7)

        def c3(name: str, inputs: int, outputs: int, repeats: int) -> None:
            hidden = outputs // 2
            conv(f'{name}.cv1', inputs, hidden, 1)
            conv(f'{name}.cv2', inputs, hidden, 1)
            conv(f'{name}.cv3', 2 * hidden, outputs, 1)
            for index in range(max(round(repeats * depth), 1)):
                conv(f'{name}.m.{index}.cv1', hidden, hidden, 1)
                conv(f'{name}.m.{index}.cv2', hidden, hidden, 3)

        c64, c128, c256, c512, c1024 = (channels(c) for c in (64, 128, 256, 512, 1024))
        conv('model.0', 3, c64, 6)
        for layer, inputs, outputs, repeats in (
            (1, c64, c128, 3),
            (3, c128, c256, 6),
            (5, c256, c512, 9),
            (7, c512, c1024, 3),
        ):
            conv(f'model.{layer}', inputs, outputs, 3)
            c3(f'model.{layer + 1}', outputs, outputs, repeats)
        conv('model.9.cv1', c1024, c1024 // 2, 1)
        conv('model.9.cv2', c1024 * 2, c1024, 1)
        conv('model.10', c1024, c512, 1)
        c3('model.13', c1024, c512, 3)
        conv('model.14', c512, c256, 1)
        c3('model.17', c512, c256, 3)
        conv('model.18', c256, c256, 3)
        c3('model.20', c512, c512, 3)
        conv('model.21', c512, c512, 3)
        c3('model.23', c1024, c1024, 3)
        for index, inputs in enumerate((c256, c512, c1024)):
            found[f'model.24.m.{index}.weight'] = torch.randn(3 * (5 + classes), inputs, 1, 1) * 0.1
            found[f'model.24.m.{index}.bias'] = torch.randn(3 * (5 + classes)) * 0.1
        strides = torch.tensor(STRIDES).view(-1, 1, 1)
        found['model.24.anchors'] = torch.tensor(ANCHORS, dtype=torch.float32) / strides
        return found

    @staticmethod
    def forward(tensors: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """Return the raw maps of RGB images in [0, 1]."""

        def conv(x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
            weight = tensors[f'{name}.conv.weight'].float()
            x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2 if padding is None else padding)
            scale, shift, mean, var = (
                tensors[f'{name}.bn.{part}'].float() for part in ('weight', 'bias', 'running_mean', 'running_var')
            )
            return F.silu(F.batch_norm(x, mean, var, scale, shift, eps=1e-3))

        def c3(x: Tensor, name: str, shortcut: bool) -> Tensor:
            y = conv(x, f'{name}.cv1')
            index = 0
            while f'{name}.m.{index}.cv1.conv.weight' in tensors:
                z = conv(conv(y, f'{name}.m.{index}.cv1'), f'{name}.m.{index}.cv2')
                y, index = (y + z if shortcut else z), index + 1
            return conv(torch.cat((y, conv(x, f'{name}.cv2')), 1), f'{name}.cv3')

        def up(x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

        x = conv(images, 'model.0', 2, 2)
        x = c3(conv(x, 'model.1', 2), 'model.2', True)
        x4 = c3(conv(x, 'model.3', 2), 'model.4', True)
        x6 = c3(conv(x4, 'model.5', 2), 'model.6', True)
        x8 = c3(conv(x6, 'model.7', 2), 'model.8', True)
        y = conv(x8, 'model.9.cv1')
        pooled = [y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
        x10 = conv(conv(torch.cat(pooled, 1), 'model.9.cv2'), 'model.10')
        x14 = conv(c3(torch.cat((up(x10), x6), 1), 'model.13', False), 'model.14')
        x17 = c3(torch.cat((up(x14), x4), 1), 'model.17', False)
        x20 = c3(torch.cat((conv(x17, 'model.18', 2), x14), 1), 'model.20', False)
        x23 = c3(torch.cat((conv(x20, 'model.21', 2), x10), 1), 'model.23', False)
        return [
            F.conv2d(
                x,
                tensors[f'model.24.m.{index}.weight'].float(),
                tensors[f'model.24.m.{index}.bias'].float(),
            )
            for index, x in enumerate((x17, x20, x23))
        ]

    @staticmethod
    def decode(maps: list[Tensor], classes: int) -> tuple[Tensor, Tensor]:
        """Return boxes (N, P, 4) in xyxy format and scores (N, P, C), in a loop over locations."""
        bboxes, scores = [], []
        for level, anchors, stride in zip(maps, ANCHORS, STRIDES, strict=True):
            rows, columns = level.shape[2:]
            for index, (width, height) in enumerate(anchors):
                for row in range(rows):
                    for column in range(columns):
                        start = index * (5 + classes)
                        p = level[:, start : start + 5 + classes, row, column].sigmoid()
                        cx = (2 * p[:, 0] - 0.5 + column) * stride
                        cy = (2 * p[:, 1] - 0.5 + row) * stride
                        w, h = (2 * p[:, 2]) ** 2 * width, (2 * p[:, 3]) ** 2 * height
                        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                        bboxes.append(torch.stack(box, -1))
                        scores.append(p[:, 4:5] * p[:, 5:])
        return torch.stack(bboxes, 1), torch.stack(scores, 1)
