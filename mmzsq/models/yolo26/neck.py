# SPDX-License-Identifier: Apache-2.0
"""Neck of YOLO26: path aggregation with C3k blocks, and attention at the coarsest output."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, Bottleneck, C2f
from mmzsq.models.yolo11.layers import C3k2, PSABlock
from mmzsq.models.yolo11.neck import YOLO11PAFPN
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO26PAFPN(YOLO11PAFPN):
    """Path aggregation network for three scales, first top-down, then bottom-up.

    All blocks are C3k. The block of the coarsest output has a single inner block instead, a bottleneck followed by
    attention.

    Args:
        deepen_factor: Scales the number of blocks of each C3k2.
        widen_factor: Scales the channels of each scale.
        max_channels: Upper limit of the channels before scaling.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution that is followed by one.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    def __init__(
        self,
        deepen_factor: float = 1.0,
        widen_factor: float = 1.0,
        max_channels: int = 512,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(deepen_factor, widen_factor, max_channels, True, norm_cfg, act_cfg, init_cfg)

    @staticmethod
    def make_block(
        in_channels: int, out_channels: int, depth: int, c3k_everywhere: bool, coarsest: bool, cfg: dict[str, Any]
    ) -> nn.Module:
        """Build the block behind a concatenation, see :meth:`~mmzsq.models.yolo11.neck.YOLO11PAFPN.make_block`."""
        if not coarsest:
            return C3k2(in_channels, out_channels, depth, c3k_everywhere, **cfg)

        def block(channels: int) -> nn.Module:
            return nn.Sequential(Bottleneck(channels, channels // 2, **cfg), PSABlock(channels, **cfg))

        return C2f(in_channels, out_channels, 1, block, **cfg)
