# SPDX-License-Identifier: Apache-2.0
"""Neck of YOLOv5: path aggregation (Liu et al. 2018, arXiv:1803.01534) with C3 blocks."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.layers import CSPLayer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, scale_depth, scale_width
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv5PAFPN(BaseModule):
    """Path aggregation network for three scales, first top-down, then bottom-up.

    Args:
        deepen_factor: Scales the number of bottlenecks of each block.
        widen_factor: Scales the channels of each scale.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    widths = (256, 512, 1024)
    depth = 3

    def __init__(
        self,
        deepen_factor: float = 1.0,
        widen_factor: float = 1.0,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        c3 = dict(num_blocks=scale_depth(self.depth, deepen_factor), add_identity=False, **cfg)
        fine, middle, coarse = (scale_width(width, widen_factor) for width in self.widths)
        self.reduce_coarse = ConvModule(coarse, middle, 1, **cfg)
        self.top_down_middle = CSPLayer(2 * middle, middle, **c3)
        self.reduce_middle = ConvModule(middle, fine, 1, **cfg)
        self.top_down_fine = CSPLayer(2 * fine, fine, **c3)
        self.downsample_fine = ConvModule(fine, fine, 3, stride=2, padding=1, **cfg)
        self.bottom_up_middle = CSPLayer(2 * fine, middle, **c3)
        self.downsample_middle = ConvModule(middle, middle, 3, stride=2, padding=1, **cfg)
        self.bottom_up_coarse = CSPLayer(2 * middle, coarse, **c3)
        self.upsample = nn.Upsample(scale_factor=2, mode='nearest')

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Fuse the scales.

        Args:
            inputs: Features of strides 8, 16 and 32.

        Returns:
            Features of the same strides and shapes.
        """
        stride8, stride16, stride32 = inputs
        coarse = self.reduce_coarse(stride32)
        middle = self.top_down_middle(torch.cat((self.upsample(coarse), stride16), dim=1))
        middle = self.reduce_middle(middle)
        out8 = self.top_down_fine(torch.cat((self.upsample(middle), stride8), dim=1))
        out16 = self.bottom_up_middle(torch.cat((self.downsample_fine(out8), middle), dim=1))
        out32 = self.bottom_up_coarse(torch.cat((self.downsample_middle(out16), coarse), dim=1))
        return out8, out16, out32
