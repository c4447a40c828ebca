# SPDX-License-Identifier: Apache-2.0
"""Layer settings, scaling rules and the SPPF block of YOLOv5 and YOLO11.

The size of a YOLOv5 model is given by two numbers: ``widen_factor`` scales all widths and ``deepen_factor`` all numbers
of bottlenecks. The values in the code are those of size l. The C3 block is MMDetection's
:class:`~mmdet.models.layers.CSPLayer`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

NORM_CFG: dict[str, Any] = dict(type='BN', eps=1e-3, momentum=0.03)
# Not in place, because distillation and priors read the output of the batch norm before the activation.
ACT_CFG: dict[str, Any] = dict(type='SiLU', inplace=False)


def scale_width(channels: int, widen_factor: float) -> int:
    """Scale the ``channels`` of size l and round up to a multiple of 8.

    Example:
        >>> scale_width(64, 0.25), scale_width(100, 0.5)
        (16, 56)
    """
    return math.ceil(channels * widen_factor / 8) * 8


def scale_depth(blocks: int, deepen_factor: float) -> int:
    """Scale the number of ``blocks`` of size l and round it, to at least 1.

    Example:
        >>> scale_depth(9, 0.33), scale_depth(1, 0.33)
        (3, 1)
    """
    return max(round(blocks * deepen_factor), 1)


class SPPF(nn.Module):
    """Spatial pyramid pooling with three chained 5x5 max poolings, whose receptive fields are 5, 9 and 13 cells.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        norm_cfg: Normalization of both convolutions.
        act_cfg: Activation of both convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
    ) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.conv1 = ConvModule(in_channels, hidden, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.conv2 = ConvModule(hidden * 4, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H, W)."""
        views = [self.conv1(x)]
        for _ in range(3):
            views.append(self.pool(views[-1]))
        return self.conv2(torch.cat(views, dim=1))
