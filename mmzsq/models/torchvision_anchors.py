# SPDX-License-Identifier: Apache-2.0
"""Anchors of torchvision's detectors, which differ from MMDetection's in three ways.

Sizes are integers, corners are rounded to pixels, and the stride of a level is the size of the padded image divided by
that of the map: 61 pixels instead of 64 for 13 rows of an image of 800. Source: ``torchvision.models.detection``,
``anchor_utils.AnchorGenerator``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.task_modules import AnchorGenerator
from torch import Tensor

from mmzsq.registry import TASK_UTILS


@TASK_UTILS.register_module()
class TorchvisionAnchorGenerator(AnchorGenerator):
    """MMDetection's ``AnchorGenerator`` with torchvision's anchors.

    Configs name it ``mmzsq.TorchvisionAnchorGenerator``. The stride of the first level must divide the size of the
    padded image.
    """

    def gen_single_level_base_anchors(
        self, base_size: float, scales: Tensor, ratios: Tensor, center: tuple[float] | None = None
    ) -> Tensor:
        """Return the anchors around the origin.

        Args:
            base_size: Size in pixels that scales refer to.
            scales: Sizes relative to ``base_size``, (S,).
            ratios: Ratios of height to width, (R,).
            center: Unused; centers are at the origin.

        Returns:
            Anchors in xyxy pixels, (R * S, 4), ratio by ratio.
        """
        # Scales are in float32, where 32 * 2^(0/3) may be just below 32.
        sizes = (base_size * scales.double() + 1e-3).floor().float()
        heights = torch.sqrt(ratios)
        widths = 1 / heights
        ws = (widths[:, None] * sizes[None, :]).flatten()
        hs = (heights[:, None] * sizes[None, :]).flatten()
        return (torch.stack([-ws, -hs, ws, hs], dim=1) / 2).round()

    def grid_priors(
        self, featmap_sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32, device: Any = 'cuda'
    ) -> list[Tensor]:
        """Return the anchors of all levels.

        Args:
            featmap_sizes: Rows and columns of each map, the first one at the finest level.
            dtype: Type of the anchors.
            device: Device of the anchors.

        Returns:
            Anchors of each level in xyxy pixels, (rows * columns * A, 4).
        """
        stride_w, stride_h = self.strides[0]
        height, width = featmap_sizes[0][0] * stride_h, featmap_sizes[0][1] * stride_w
        levels = []
        for base_anchors, (rows, columns) in zip(self.base_anchors, featmap_sizes, strict=True):
            xs = torch.arange(columns, device=device).to(dtype) * (width // columns)
            ys = torch.arange(rows, device=device).to(dtype) * (height // rows)
            shift_x, shift_y = self._meshgrid(xs, ys)
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
            anchors = base_anchors.to(device=device, dtype=dtype)
            levels.append((anchors[None] + shifts[:, None]).view(-1, 4))
        return levels
