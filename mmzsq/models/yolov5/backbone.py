# SPDX-License-Identifier: Apache-2.0
"""Backbone of YOLOv5 v6.0 and later.

It has a 6x6 stem, four stages with a strided convolution and a C3 block, and SPPF.
"""

from __future__ import annotations

from typing import Any

from mmcv.cnn import ConvModule
from mmdet.models.layers import CSPLayer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmzsq.models.yolo.layers import (
    ACT_CFG,
    NORM_CFG,
    SPPF,
    scale_depth,
    scale_width,
)
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv5CSPDarknet(BaseModule):
    """CSPDarknet with C3 blocks and SPPF.

    Args:
        deepen_factor: Scales the number of bottlenecks of each stage.
        widen_factor: Scales the channels of each stage.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    widths = (64, 128, 256, 512, 1024)
    depths = (3, 6, 9, 3)

    def __init__(
        self,
        deepen_factor: float = 1.0,
        widen_factor: float = 1.0,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        cfg: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        widths = [scale_width(width, widen_factor) for width in self.widths]
        self.stem = ConvModule(3, widths[0], 6, stride=2, padding=2, **cfg)
        stages = []
        for width_in, width, depth in zip(widths[:-1], widths[1:], self.depths, strict=True):
            stages.append(
                nn.Sequential(
                    ConvModule(width_in, width, 3, stride=2, padding=1, **cfg),
                    CSPLayer(width, width, num_blocks=scale_depth(depth, deepen_factor), **cfg),
                )
            )
        stages[-1].append(SPPF(widths[-1], widths[-1], **cfg))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of strides 8, 16 and 32.

        Args:
            x: RGB images in [0, 1], shape (N, 3, H, W) with H and W multiples of 32.
        """
        stride8 = self.stage2(self.stage1(self.stem(x)))
        stride16 = self.stage3(stride8)
        return stride8, stride16, self.stage4(stride16)
