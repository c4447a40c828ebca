# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions without MMCV's compiled operators follow the equations of their papers."""

from __future__ import annotations

import sys
from itertools import product
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d, modulated_deform_conv2d
from torch import Tensor

from mmzsq.mmcv_ops.torchvision_ops import TorchvisionOps

pytestmark = pytest.mark.skipif(
    not isinstance(sys.modules.get('mmcv._ext'), TorchvisionOps), reason='a compiled mmcv is installed'
)

GEOMETRIES = [
    dict(stride=1, padding=1, dilation=1, groups=1, deform_groups=1),
    dict(stride=2, padding=0, dilation=1, groups=2, deform_groups=1),
    dict(stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=1, deform_groups=2),
]


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """Interpolate ``plane``, which is zero outside its borders."""
    total = 0.0
    for row, column in product((floor(y), floor(y) + 1), (floor(x), floor(x) + 1)):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def plain_deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, geometry: dict[str, Any]) -> np.ndarray:
    """Compute equation 2 of Dai et al. and equation 1 of Zhu et al. in plain loops."""
    images, offsets, masks, filters = (value.numpy() for value in (x, offset, mask, weight))
    stride, padding, dilation = (pair(geometry[key]) for key in ('stride', 'padding', 'dilation'))
    groups, deform_groups = geometry['groups'], geometry['deform_groups']
    out = np.zeros((len(images), len(filters), *offsets.shape[2:]))
    width, taps = filters.shape[1], filters.shape[2] * filters.shape[3]
    for n, c_out, row, column in np.ndindex(*out.shape):
        for c, tap_y, tap_x in np.ndindex(*filters.shape[1:]):
            channel = c_out // (len(filters) // groups) * width + c
            tap = channel // (images.shape[1] // deform_groups) * taps + tap_y * filters.shape[3] + tap_x
            y = row * stride[0] - padding[0] + tap_y * dilation[0] + offsets[n, 2 * tap, row, column]
            x_ = column * stride[1] - padding[1] + tap_x * dilation[1] + offsets[n, 2 * tap + 1, row, column]
            value = bilinear(images[n, channel], y, x_) * masks[n, tap, row, column]
            out[n, c_out, row, column] += filters[c_out, c, tap_y, tap_x] * value
    return out


def operands(geometry: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw input, offset, mask and weight, with offsets of up to a few pixels."""
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(2, 4 // geometry['groups'], 3, 2)
    size = [
        (x.shape[2 + axis] + 2 * pair(geometry['padding'])[axis] - pair(geometry['dilation'])[axis] * (kernel - 1) - 1)
        // pair(geometry['stride'])[axis]
        + 1
        for axis, kernel in enumerate((3, 2))
    ]
    taps = geometry['deform_groups'] * 6
    offset, mask = 1.5 * torch.randn(2, 2 * taps, *size), torch.rand(2, taps, *size)
    return x.to(dtype), offset.to(dtype), mask.to(dtype), weight.to(dtype)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_both_versions_equal_the_sum_over_offset_positions(geometry: dict[str, Any]) -> None:
    x, offset, mask, weight = operands(geometry)
    bias = torch.randn(2).double()
    arguments = geometry.values()
    expected = plain_deform_conv(x, offset, mask, weight, geometry) + bias.numpy()[:, None, None]
    actual = modulated_deform_conv2d(x, offset, mask, weight, bias, *arguments)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10, atol=1e-10)
    unmodulated = plain_deform_conv(x, offset, torch.ones_like(mask), weight, geometry)
    np.testing.assert_allclose(
        deform_conv2d(x, offset, weight, *arguments).numpy(), unmodulated, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_gradients_of_all_operands_are_those_of_the_output(geometry: dict[str, Any]) -> None:
    x, offset, mask, weight = (value.requires_grad_() for value in operands(geometry))
    bias = torch.randn(2).double().requires_grad_()
    arguments = tuple(geometry.values())
    assert torch.autograd.gradcheck(lambda *v: modulated_deform_conv2d(*v, *arguments), (x, offset, mask, weight, bias))
    assert torch.autograd.gradcheck(lambda *v: deform_conv2d(*v, *arguments), (x, offset, weight))


def test_offsets_of_a_larger_map_are_read_as_memory_of_the_outputs_shape() -> None:
    """The compiled operator indexes each kernel position with rows of the output's width."""
    geometry = GEOMETRIES[0]
    x, offset, mask, weight = operands(geometry)
    wide_offset, wide_mask = torch.randn(2, 12, 10, 11).double(), torch.rand(2, 6, 10, 11).double()
    for wide, small in ((wide_offset, offset), (wide_mask, mask)):
        for image in range(2):
            wide[image].reshape(-1)[: small[image].numel()] = small[image].reshape(-1)
    bias = torch.randn(2).double()
    arguments = tuple(geometry.values())
    expected = plain_deform_conv(x, offset, mask, weight, geometry) + bias.numpy()[:, None, None]
    leaves = [value.requires_grad_() for value in (x, wide_offset, wide_mask, weight, bias)]
    actual = modulated_deform_conv2d(*leaves, *arguments)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *v: modulated_deform_conv2d(*v, *arguments), leaves)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_16_bit_types_are_the_rounded_fp32_ones(dtype: torch.dtype) -> None:
    x, offset, mask, weight = operands(GEOMETRIES[0], dtype)
    outs, grads = [], []
    for kind in (torch.float32, dtype):
        image = x.to(kind).requires_grad_()
        out = modulated_deform_conv2d(image, *(v.to(kind) for v in (offset, mask, weight)), None, 1, 1, 1, 1, 1)
        out.backward(torch.ones_like(out))
        outs.append(out)
        grads.append(image.grad)
    assert outs[1].dtype == grads[1].dtype == dtype
    torch.testing.assert_close(outs[1], outs[0].to(dtype))
    torch.testing.assert_close(grads[1], grads[0].to(dtype))


@pytest.mark.parametrize(('cls', 'factor'), [(DeformConv2dPack, 1.0), (ModulatedDeformConv2dPack, 0.5)])
def test_newly_initialized_layers_are_plain_convolutions(cls: type, factor: float) -> None:
    """Initially, offsets are zero and every mask value is the sigmoid of zero."""
    layer, x = cls(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 6, 6)
    expected = factor * torch.nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_a_map_smaller_than_the_kernel_is_zero_padded() -> None:
    layer, x = DeformConv2d(2, 2, 3, padding=1), torch.randn(1, 2, 1, 2)
    expected = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x, torch.zeros(1, 18, 1, 2)), expected)
