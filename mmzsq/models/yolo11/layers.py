# SPDX-License-Identifier: Apache-2.0
"""Blocks of YOLO11: C3k2, a C2f block with C3k blocks or bottlenecks inside, and C2PSA, which uses attention.

The size of a YOLO11 model is given by ``deepen_factor`` and ``widen_factor`` as in YOLOv5, an upper limit of the
channels before scaling, and whether all C3k2 consist of C3k blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.layers import CSPLayer
from torch import Tensor, nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, Bottleneck, C2f

HEAD_CHANNELS = 64
"""Channels per attention head."""


class C3k(CSPLayer):
    """The C3 block of YOLOv5 with two bottlenecks of 3x3 convolutions.

    Args:
        channels: Channels of input and output.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
    """

    def __init__(self, channels: int, norm_cfg: dict[str, Any], act_cfg: dict[str, Any]) -> None:
        super().__init__(channels, channels, num_blocks=0, norm_cfg=norm_cfg, act_cfg=act_cfg)
        hidden = channels // 2
        self.blocks.extend(Bottleneck(hidden, hidden, norm_cfg, act_cfg) for _ in range(2))


class C3k2(C2f):
    """A C2f block whose inner blocks halve their channels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        num_blocks: Number of chained blocks.
        c3k: Whether the blocks are :class:`C3k` instead of :class:`~mmzsq.models.yolo.layers.Bottleneck`.
        expand_ratio: Channels of one half as a fraction of ``out_channels``.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int = 1,
        c3k: bool = False,
        expand_ratio: float = 0.5,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
    ) -> None:
        def block(channels: int) -> nn.Module:
            if c3k:
                return C3k(channels, norm_cfg, act_cfg)
            return Bottleneck(channels, channels // 2, norm_cfg, act_cfg)

        super().__init__(in_channels, out_channels, num_blocks, block, expand_ratio, norm_cfg, act_cfg)


class SpatialAttention(nn.Module):
    """Self-attention over all cells of a map.

    A depthwise 3x3 convolution of the values encodes their positions. Queries and keys have half as many channels as
    the values.

    Args:
        channels: Channels of input and output.
        norm_cfg: Normalization of every convolution.

    Attributes:
        num_heads: Number of heads: one per 64 channels, at least one.
    """

    def __init__(self, channels: int, norm_cfg: dict[str, Any] = NORM_CFG) -> None:
        super().__init__()
        self.num_heads = max(channels // HEAD_CHANNELS, 1)
        self.value_channels = channels // self.num_heads
        self.key_channels = self.value_channels // 2
        self.scale = self.key_channels**-0.5
        outputs = channels + 2 * self.key_channels * self.num_heads
        self.qkv = ConvModule(channels, outputs, 1, norm_cfg=norm_cfg, act_cfg=None)
        self.position = ConvModule(channels, channels, 3, padding=1, groups=channels, norm_cfg=norm_cfg, act_cfg=None)
        self.proj = ConvModule(channels, channels, 1, norm_cfg=norm_cfg, act_cfg=None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        query, key, value = self.split(x)
        probability = (query @ key).softmax(-1)
        return self.merge(probability @ value, value, x)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the operands of attention over the L = H * W cells.

        Args:
            x: Input of the module, (N, C, H, W).

        Returns:
            Scaled queries (N, heads, L, C_key), keys (N, heads, C_key, L) and values (N, heads, L, C_value).
        """
        qkv = self.qkv(x).flatten(2).unflatten(1, (self.num_heads, -1))
        query, key, value = qkv.split((self.key_channels, self.key_channels, self.value_channels), dim=2)
        return query.transpose(2, 3) * self.scale, key, value.transpose(2, 3)

    def merge(self, attended: Tensor, value: Tensor, x: Tensor) -> Tensor:
        """Concatenate the heads and add the positional encoding.

        Args:
            attended: Output of the attention, (N, heads, L, C_value).
            value: The values, of the same shape.
            x: Input of the module; only its shape (N, C, H, W) is used.
        """
        attended, value = (heads.transpose(2, 3).reshape(x.shape) for heads in (attended, value))
        return self.proj(attended + self.position(value))


class PSABlock(nn.Module):
    """Attention and a feed-forward network, each with a residual connection.

    Args:
        channels: Channels of input and output.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation inside the feed-forward network.
    """

    def __init__(self, channels: int, norm_cfg: dict[str, Any], act_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.attn = SpatialAttention(channels, norm_cfg)
        self.ffn = nn.Sequential(
            ConvModule(channels, 2 * channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg),
            ConvModule(2 * channels, channels, 1, norm_cfg=norm_cfg, act_cfg=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        x = x + self.attn(x)
        return x + self.ffn(x)


class C2PSA(nn.Module):
    """Cross stage partial block with :class:`PSABlock` on one half of the channels.

    Args:
        channels: Channels of input and output.
        num_blocks: Number of chained blocks.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution that is followed by one.
    """

    def __init__(
        self,
        channels: int,
        num_blocks: int = 1,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
    ) -> None:
        super().__init__()
        half = channels // 2
        self.main_conv = ConvModule(channels, 2 * half, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.blocks = nn.Sequential(*(PSABlock(half, norm_cfg, act_cfg) for _ in range(num_blocks)))
        self.final_conv = ConvModule(2 * half, channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        kept, attended = self.main_conv(x).chunk(2, dim=1)
        return self.final_conv(torch.cat((kept, self.blocks(attended)), dim=1))
