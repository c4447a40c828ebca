# SPDX-License-Identifier: Apache-2.0
"""Layer settings, scaling rules and blocks that several YOLO models share.

The size of a model is given by two numbers: ``widen_factor`` scales all widths and ``deepen_factor`` all numbers of
blocks. The values in the code are those of size l. Since YOLOv8, a third number limits the channels before scaling. The
C3 block of YOLOv5 is MMDetection's :class:`~mmdet.models.layers.CSPLayer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def scale_widths(widths: tuple[int, ...], widen_factor: float, max_channels: int) -> list[int]:
    """Limit ``widths`` to ``max_channels`` and scale them.

    Args:
        widths: Channels in size l without the limit.
        widen_factor: Scale factor.
        max_channels: Upper limit before scaling.

    Example:
        >>> scale_widths((256, 1024), 0.5, 512)
        [128, 256]
    """
    return [scale_width(min(width, max_channels), widen_factor) for width in widths]


def scale_depth(blocks: int, deepen_factor: float) -> int:
    """Scale the number of ``blocks`` of size l and round it, to at least 1.

    Example:
        >>> scale_depth(9, 0.33), scale_depth(1, 0.33)
        (3, 1)
    """
    return max(round(blocks * deepen_factor), 1)


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a residual connection by default.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the convolutions.
        norm_cfg: Normalization of both convolutions.
        act_cfg: Activation of both convolutions.
        add_identity: Whether to add the input to the output.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        norm_cfg: dict[str, Any],
        act_cfg: dict[str, Any],
        add_identity: bool = True,
    ) -> None:
        super().__init__()
        self.add_identity = add_identity
        self.conv1 = ConvModule(channels, hidden, 3, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.conv2 = ConvModule(hidden, channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        out = self.conv2(self.conv1(x))
        return x + out if self.add_identity else out


class C2f(nn.Module):
    """Cross stage partial block that concatenates both halves of its first convolution and the output of each block.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        num_blocks: Number of chained blocks.
        block: Builds a block from its number of channels, that of one half.
        expand_ratio: Channels of one half as a fraction of ``out_channels``.
        norm_cfg: Normalization of both convolutions.
        act_cfg: Activation of both convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        block: Callable[[int], nn.Module],
        expand_ratio: float = 0.5,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
    ) -> None:
        super().__init__()
        half = int(out_channels * expand_ratio)
        self.main_conv = ConvModule(in_channels, 2 * half, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.blocks = nn.ModuleList(block(half) for _ in range(num_blocks))
        self.final_conv = ConvModule((2 + num_blocks) * half, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H, W)."""
        parts = list(self.main_conv(x).chunk(2, dim=1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.final_conv(torch.cat(parts, dim=1))


class SPPF(nn.Module):
    """Spatial pyramid pooling with three chained 5x5 max poolings, whose receptive fields are 5, 9 and 13 cells.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        norm_cfg: Normalization of both convolutions.
        act_cfg: Activation of both convolutions.
        residual: The form of YOLO26: the first convolution has no activation, and the input is added to the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        residual: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.residual = residual
        self.conv1 = ConvModule(in_channels, hidden, 1, norm_cfg=norm_cfg, act_cfg=None if residual else act_cfg)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.conv2 = ConvModule(hidden * 4, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H, W)."""
        views = [self.conv1(x)]
        for _ in range(3):
            views.append(self.pool(views[-1]))
        out = self.conv2(torch.cat(views, dim=1))
        return x + out if self.residual else out
