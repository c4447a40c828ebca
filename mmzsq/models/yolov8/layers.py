# SPDX-License-Identifier: Apache-2.0
"""The C2f block of YOLOv8, with bottlenecks as wide as one half of the block."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmzsq.models.yolo.layers import Bottleneck, C2f


def bottleneck_c2f(
    in_channels: int, out_channels: int, num_blocks: int, add_identity: bool, cfg: dict[str, Any]
) -> C2f:
    """Build a C2f block of bottlenecks that keep the number of channels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        num_blocks: Number of chained bottlenecks.
        add_identity: Whether each bottleneck adds its input to its output.
        cfg: ``norm_cfg`` and ``act_cfg`` of every convolution.
    """

    def block(channels: int) -> nn.Module:
        return Bottleneck(channels, channels, add_identity=add_identity, **cfg)

    return C2f(in_channels, out_channels, num_blocks, block, **cfg)
