# SPDX-License-Identifier: Apache-2.0
"""Neck of YOLO11: path aggregation (Liu et al. 2018, arXiv:1803.01534) with C3k2 blocks."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, scale_depth
from mmzsq.models.yolo11.layers import C3k2, scale_widths
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11PAFPN(BaseModule):
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
        super().__init__(init_cfg=init_cfg)
        cfg: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        depth = scale_depth(self.depth, deepen_factor)
        in8, in16, in32 = scale_widths(self.widths_in, widen_factor, max_channels)
        fine, middle, coarse = scale_widths(self.widths, widen_factor, max_channels)
        self.top_down_middle = C3k2(in32 + in16, middle, depth, c3k_everywhere, **cfg)
        self.top_down_fine = C3k2(middle + in8, fine, depth, c3k_everywhere, **cfg)
        self.downsample_fine = ConvModule(fine, fine, 3, stride=2, padding=1, **cfg)
        self.bottom_up_middle = C3k2(fine + middle, middle, depth, c3k_everywhere, **cfg)
        self.downsample_middle = ConvModule(middle, middle, 3, stride=2, padding=1, **cfg)
        self.bottom_up_coarse = C3k2(middle + in32, coarse, depth, c3k=True, **cfg)
        self.upsample = nn.Upsample(scale_factor=2, mode='nearest')

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Fuse the scales.

        Args:
            inputs: Features of strides 8, 16 and 32.

        Returns:
            Features of the same strides.
        """
        stride8, stride16, stride32 = inputs
        middle = self.top_down_middle(torch.cat((self.upsample(stride32), stride16), dim=1))
        out8 = self.top_down_fine(torch.cat((self.upsample(middle), stride8), dim=1))
        out16 = self.bottom_up_middle(torch.cat((self.downsample_fine(out8), middle), dim=1))
        out32 = self.bottom_up_coarse(torch.cat((self.downsample_middle(out16), stride32), dim=1))
        return out8, out16, out32
