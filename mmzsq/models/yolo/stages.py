# SPDX-License-Identifier: Apache-2.0
"""Structure of the backbones and necks of YOLOv8, YOLO11 and YOLO26, whose blocks differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG


class FourStages(BaseModule):
    """A strided stem and four stages, each of which halves the resolution.

    Args:
        stem: Maps RGB images (N, 3, H, W) in [0, 1] to half their resolution.
        stages: The four stages.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.stem = stem
        self.stage1, self.stage2, self.stage3, self.stage4 = stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of strides 8, 16 and 32.

        Args:
            x: RGB images in [0, 1], shape (N, 3, H, W) with H and W multiples of 32.
        """
        stride8 = self.stage2(self.stage1(self.stem(x)))
        stride16 = self.stage3(stride8)
        return stride8, stride16, self.stage4(stride16)


class PathAggregation(BaseModule):
    """Path aggregation (Liu et al. 2018, arXiv:1803.01534) for three scales, first top-down, then bottom-up.

    Maps are concatenated, and a block follows each concatenation.

    Args:
        in_channels: Channels of strides 8, 16 and 32.
        out_channels: Channels of the outputs of the same strides.
        block: Builds a block from its input channels, its output channels and whether it makes the coarsest output.
        norm_cfg: Normalization of the strided convolutions.
        act_cfg: Activation of the strided convolutions.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        block: Callable[[int, int, bool], nn.Module],
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        cfg: dict[str, Any] = dict(kernel_size=3, stride=2, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        in8, in16, in32 = in_channels
        fine, middle, coarse = out_channels
        self.top_down_middle = block(in32 + in16, middle, False)
        self.top_down_fine = block(middle + in8, fine, False)
        self.downsample_fine = ConvModule(fine, fine, **cfg)
        self.bottom_up_middle = block(fine + middle, middle, False)
        self.downsample_middle = ConvModule(middle, middle, **cfg)
        self.bottom_up_coarse = block(middle + in32, coarse, True)
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
