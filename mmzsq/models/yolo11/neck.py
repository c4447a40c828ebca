# SPDX-License-Identifier: Apache-2.0
"""Neck of YOLO11: path aggregation (Liu et al. 2018, arXiv:1803.01534) with C3k2 blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, scale_depth, scale_widths
from mmzsq.models.yolo.stages import PathAggregation
from mmzsq.models.yolo11.layers import C3k2
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11PAFPN(PathAggregation):
    """Path aggregation network for three scales, first top-down, then bottom-up.

    Args:
        deepen_factor: Scales the number of blocks of each C3k2.
        widen_factor: Scales the channels of each scale.
        max_channels: Upper limit of the channels before scaling.
        c3k_everywhere: Whether all blocks are C3k, instead of only those of the coarsest output.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    widths_in = (512, 512, 1024)
    widths = (256, 512, 1024)
    depth = 2

    def __init__(
        self,
        deepen_factor: float = 1.0,
        widen_factor: float = 1.0,
        max_channels: int = 512,
        c3k_everywhere: bool = True,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        cfg: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        depth = scale_depth(self.depth, deepen_factor)

        def block(in_channels: int, out_channels: int, coarsest: bool) -> nn.Module:
            return self.make_block(in_channels, out_channels, depth, c3k_everywhere, coarsest, cfg)

        super().__init__(
            scale_widths(self.widths_in, widen_factor, max_channels),
            scale_widths(self.widths, widen_factor, max_channels),
            block,
            init_cfg=init_cfg,
            **cfg,
        )

    @staticmethod
    def make_block(
        in_channels: int, out_channels: int, depth: int, c3k_everywhere: bool, coarsest: bool, cfg: dict[str, Any]
    ) -> nn.Module:
        """Build the block behind a concatenation.

        Args:
            in_channels: Channels of its input.
            out_channels: Channels of its output.
            depth: Number of inner blocks.
            c3k_everywhere: See the class.
            coarsest: Whether it makes the coarsest output.
            cfg: ``norm_cfg`` and ``act_cfg``.
        """
        return C3k2(in_channels, out_channels, depth, c3k_everywhere or coarsest, **cfg)
