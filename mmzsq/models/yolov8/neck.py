# SPDX-License-Identifier: Apache-2.0
"""Neck of YOLOv8: path aggregation (Liu et al. 2018, arXiv:1803.01534) with C2f blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, scale_depth, scale_widths
from mmzsq.models.yolo.stages import PathAggregation
from mmzsq.models.yolov8.layers import bottleneck_c2f
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv8PAFPN(PathAggregation):
    """Path aggregation network for three scales, first top-down, then bottom-up.

    The bottlenecks of its C2f blocks have no residual connection.

    Args:
        deepen_factor: Scales the number of bottlenecks of each C2f block.
        widen_factor: Scales the channels of each scale.
        max_channels: Upper limit of the channels before scaling.
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
        max_channels: int = 512,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        cfg: dict[str, Any] = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        widths = scale_widths(self.widths, widen_factor, max_channels)
        depth = scale_depth(self.depth, deepen_factor)

        def block(in_channels: int, out_channels: int, coarsest: bool) -> nn.Module:
            return bottleneck_c2f(in_channels, out_channels, depth, add_identity=False, cfg=cfg)

        super().__init__(widths, widths, block, init_cfg=init_cfg, **cfg)
