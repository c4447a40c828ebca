# SPDX-License-Identifier: Apache-2.0
"""Backbone of YOLO11: a stem, four stages with a strided convolution and a C3k2 block, then SPPF and C2PSA."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import ConvModule
from torch import nn

from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, SPPF, scale_depth, scale_widths
from mmzsq.models.yolo.stages import FourStages
from mmzsq.models.yolo11.layers import C2PSA, C3k2
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11CSPDarknet(FourStages):
    """CSPDarknet with C3k2 blocks, SPPF and C2PSA.

    Args:
        deepen_factor: Scales the number of blocks of each stage.
        widen_factor: Scales the channels of each stage.
        max_channels: Upper limit of the channels before scaling.
        c3k_everywhere: Whether the first two stages also use C3k blocks instead of bottlenecks.
        norm_cfg: Normalization of every convolution.
        act_cfg: Activation of every convolution that is followed by one.
        init_cfg: Initialization; by default that of each :class:`~mmcv.cnn.ConvModule`.
    """

    stem_width = 64
    strided_widths = (128, 256, 512, 1024)
    widths = (256, 512, 512, 1024)
    expand_ratios = (0.25, 0.25, 0.5, 0.5)
    c3k = (False, False, True, True)
    depth = 2
    sppf_residual = False

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
        (width_in,) = scale_widths((self.stem_width,), widen_factor, max_channels)
        strided, widths = (scale_widths(w, widen_factor, max_channels) for w in (self.strided_widths, self.widths))
        stem = ConvModule(3, width_in, 3, stride=2, padding=1, **cfg)
        stages = []
        for width_strided, width, ratio, c3k in zip(strided, widths, self.expand_ratios, self.c3k, strict=True):
            stages.append(
                nn.Sequential(
                    ConvModule(width_in, width_strided, 3, stride=2, padding=1, **cfg),
                    C3k2(width_strided, width, depth, c3k or c3k_everywhere, ratio, **cfg),
                )
            )
            width_in = width
        stages[-1].extend((SPPF(width_in, width_in, residual=self.sppf_residual, **cfg), C2PSA(width_in, depth, **cfg)))
        super().__init__(stem, stages, init_cfg)
