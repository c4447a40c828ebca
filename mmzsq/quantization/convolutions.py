# SPDX-License-Identifier: Apache-2.0
"""Quantized layers for MMCV's special convolutions: adaptive padding, weight standardization and deformable ones.

Each class repeats the ``forward`` of its float class with quantized weight and input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    MaskedConv2d,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    deform_conv2d,
    modulated_deform_conv2d,
)
from torch import Tensor, nn

from mmzsq.quantization.modules import QuantizedLayer, register_quantized


@register_quantized(Conv2dAdaptivePadding)
class QuantConv2dAdaptivePadding(QuantizedLayer, Conv2dAdaptivePadding, nn.Conv2d):
    """Convolution with TensorFlow's ``'same'`` padding, with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, ceil(H / stride), ceil(W / stride))."""
        padding: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            missing = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            padding += [missing // 2, missing - missing // 2]
        padded = F.pad(self.input_quantizer(x), padding)
        return self._conv_forward(padded, self.weight_quantizer(self.weight), self.bias)


@register_quantized(ConvWS2d)
class QuantConvWS2d(QuantizedLayer, ConvWS2d, nn.Conv2d):
    """Weight-standardized convolution (Qiao et al., 2019) with quantized weight and input.

    The standardized weight is quantized, since an integer deployment stores only that.
    """

    can_set_filters: ClassVar[bool] = False

    eps: float

    def filters(self) -> Tensor:
        """Return the weight with every filter standardized, (C_out, C_in / groups, kH, kW)."""
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return (self.weight - mean) / (std + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        weight = self.weight_quantizer(self.filters())
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


@register_quantized(ConvAWS2d)
class QuantConvAWS2d(QuantizedLayer, ConvAWS2d, nn.Conv2d):
    """Adaptively weight-standardized convolution (Qiao et al., 2020) with quantized weight and input.

    The standardized weight is quantized, as in :class:`QuantConvWS2d`.
    """

    can_set_filters: ClassVar[bool] = False

    _get_weight: Callable[[Tensor], Tensor]

    def filters(self) -> Tensor:
        """Return the weight with every filter standardized, scaled and shifted, (C_out, C_in / groups, kH, kW)."""
        return self._get_weight(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        weight = self.weight_quantizer(self.filters())
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


@register_quantized(MaskedConv2d)
class QuantMaskedConv2d(QuantizedLayer, MaskedConv2d, nn.Conv2d):
    """Convolution of heads with guided anchors (Wang et al., 2019), with quantized weight and input."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W'), everywhere: the mask only saves time."""
        weight = self.weight_quantizer(self.filters())
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


class _QuantDeformConv(QuantizedLayer):
    """Base of the deformable convolutions: both operators with quantized weight and input.

    Offsets, the masks of v2 and the interpolation between quantized inputs stay float. The convolution with which a
    ``Pack`` predicts offsets and masks is a separate layer.
    """

    def _convolve(self, x: Tensor, offset: Tensor) -> Tensor:
        layer: Any = self
        return deform_conv2d(
            layer.input_quantizer(x),
            offset,
            layer.weight_quantizer(layer.weight),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.deform_groups,
            False,
            layer.im2col_step,
        )

    def _convolve_modulated(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        layer: Any = self
        return modulated_deform_conv2d(
            layer.input_quantizer(x),
            offset,
            mask,
            layer.weight_quantizer(layer.weight),
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.deform_groups,
        )


@register_quantized(DeformConv2d)
class QuantDeformConv2d(_QuantDeformConv, DeformConv2d):
    """Deformable convolution (Dai et al., 2017) with quantized weight and input."""

    kernel_size: tuple[int, int]

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W), sampled at positions shifted by ``offset`` in pixels, into (N, C_out, H', W')."""
        # The compiled operator rejects inputs smaller than its kernel.
        height, width = (max(k - size, 0) for k, size in zip(self.kernel_size, x.shape[2:], strict=True))
        if height or width:
            x, offset = F.pad(x, (0, width, 0, height)), F.pad(offset, (0, width, 0, height))
        out = self._convolve(x, offset)
        return out[:, :, : out.shape[2] - height, : out.shape[3] - width]


@register_quantized(DeformConv2dPack)
class QuantDeformConv2dPack(_QuantDeformConv, DeformConv2dPack):
    """Deformable convolution that predicts its offsets, with quantized weight and input."""

    conv_offset: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        return self._convolve(x, self.conv_offset(x))


@register_quantized(ModulatedDeformConv2d)
class QuantModulatedDeformConv2d(_QuantDeformConv, ModulatedDeformConv2d):
    """Deformable convolution v2 (Zhu et al., 2019) with quantized weight and input."""

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W), sampled with ``offset`` and weighted by ``mask``, into (N, C_out, H', W')."""
        return self._convolve_modulated(x, offset, mask)


@register_quantized(ModulatedDeformConv2dPack)
class QuantModulatedDeformConv2dPack(_QuantDeformConv, ModulatedDeformConv2dPack):
    """Deformable convolution v2 that predicts its offsets and mask, with quantized weight and input."""

    conv_offset: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        rows, columns, mask = self.conv_offset(x).chunk(3, dim=1)
        return self._convolve_modulated(x, torch.cat((rows, columns), dim=1), mask.sigmoid())
