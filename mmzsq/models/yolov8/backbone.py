# SPDX-License-Identifier: Apache-2.0
"""Backbone of YOLOv8: a stem, four stages with a strided convolution and a C2f block, then SPPF."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import ConvModule
from torch import nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, SPPF, scale_depth, scale_widths
from mmzsq.models.yolo.stages import FourStages
from mmzsq.models.yolov8.layers import bottleneck_c2f
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv8CSPDarknet(FourStages):
    """CSPDarknet with C2f blocks and SPPF.

    Args:
        deepen_factor: Scales the number of bottlenecks of each stage.
        widen_factor: Scales the channels of each stage.
        max_channels: Upper limit of the channels before scaling.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    stem_width = 64
    widths = (128, 256, 512, 1024)
    depths = (3, 6, 6, 3)

    def __init__(
        self,
        deepen_factor: float = 1.0,
        widen_factor: float = 1.0,
        max_channels: int = 512,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        cfg: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        width_in, *widths = scale_widths((self.stem_width, *self.widths), widen_factor, max_channels)
        stem = ConvModule(3, width_in, 3, stride=2, padding=1, **cfg)
        stages = []
        for width, depth in zip(widths, self.depths, strict=True):
            stages.append(
                nn.Sequential(
                    ConvModule(width_in, width, 3, stride=2, padding=1, **cfg),
                    bottleneck_c2f(width, width, scale_depth(depth, deepen_factor), add_identity=True, cfg=cfg),
                )
            )
            width_in = width
        stages[-1].append(SPPF(width_in, width_in, **cfg))
        super().__init__(stem, stages, init_cfg)
