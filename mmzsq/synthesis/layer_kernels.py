# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for layers that in PyTorch use only a fraction of the memory bandwidth of a GPU.

They move blocks of pixels to aligned channels in one pass, and compute max pooling with stride 1 and nearest upsampling
of channels_last features with many values in each program. The backward reads slices of wider gradients, as returned by
a concatenation, without a copy. Each kernel computes the same as a PyTorch function, its reference in the tests. Import
this module only where :data:`mmzsq.fused_kernels.HAS_TRITON` is true.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmzsq.synthesis.kernels import ceil_div, row_stride

TILE = 1024
"""Number of values of one program."""


def _with_row_stride(grad: Tensor) -> tuple[Tensor, int]:
    """Return a gradient and its :func:`row_stride`, copied only if it has none."""
    stride = row_stride(grad)
    if stride is not None:
        return grad, stride
    return grad.contiguous(memory_format=torch.channels_last), grad.shape[1]


def _empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


@triton.jit
def _image_blocks_forward(
    x, y, size, height, width, x_image, x_channel, x_row, x_column, channels: tl.constexpr, block: tl.constexpr,
    padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    part = place % padded
    pixel = place // padded
    column = (pixel % width) * block + part % block
    row = (pixel // width % height) * block + part // block % block
    channel = part // (block * block)
    source = (pixel // width // height) * x_image + channel * x_channel + row * x_row + column * x_column
    value = tl.load(x + source, mask=(place < size) & (channel < channels), other=0.0)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=place < size)


@triton.jit
def _image_blocks_backward(
    grad_y, grad_x, size, height, width, grad_stride, channels: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    channel = place % channels
    pixel = place // channels
    column = pixel % width
    row = pixel // width % height
    of_block = ((pixel // width // height) * (height // block) + row // block) * (width // block) + column // block
    part = channel * (block * block) + (row % block) * block + column % block
    value = tl.load(grad_y + of_block * grad_stride + part, mask=place < size, other=0.0)
    tl.store(grad_x + place, value.to(grad_x.dtype.element_ty), mask=place < size)


class ImageBlocks(torch.autograd.Function):
    """``pixel_unshuffle`` of images to channels_last, padded with zero channels, in another type.

    Inputs: images (N, C, H, W), with H and W multiples of the block side; the block side; number of channels and type
    of the output.

    Output: (N, channels, H / block, W / block).
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, block: int, padded: int, dtype: torch.dtype) -> Tensor:
        """See the class."""
        count, channels, height, width = images.shape
        output = _empty((count, padded, height // block, width // block), images, dtype)
        size = output.numel()
        _image_blocks_forward[(ceil_div(size, TILE),)](
            images, output, size, height // block, width // block, *images.stride(), channels, block, padded, TILE
        )
        ctx.shape, ctx.dtype, ctx.block = images.shape, images.dtype, block
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """Compute the gradient of the images."""
        grad_output, grad_stride = _with_row_stride(grad_output)
        grad = _empty(ctx.shape, grad_output, ctx.dtype)
        size = grad.numel()
        _image_blocks_backward[(ceil_div(size, TILE),)](
            grad_output, grad, size, *ctx.shape[2:], grad_stride, ctx.shape[1], ctx.block, TILE
        )
        return grad, None, None, None


@triton.jit
def _max_pool_forward(x, y, best_at, size, height, width, channels, kernel: tl.constexpr, tile: tl.constexpr):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    pixel = place // channels
    column = pixel % width
    row = pixel // width % height
    best = tl.full((tile,), float('-inf'), tl.float32)
    at = tl.zeros((tile,), tl.int32)
    for down in tl.static_range(kernel):
        for right in tl.static_range(kernel):
            y_step, x_step = down - kernel // 2, right - kernel // 2
            inside = (row + y_step >= 0) & (row + y_step < height) & (column + x_step >= 0) & (column + x_step < width)
            source = place + (y_step * width + x_step) * channels
            value = tl.load(x + source, mask=inside & (place < size), other=float('-inf')).to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            at = tl.where(better, down * kernel + right, at)
    tl.store(y + place, best.to(y.dtype.element_ty), mask=place < size)
    tl.store(best_at + place, at.to(tl.uint8), mask=place < size)


@triton.jit
def _max_pool_backward(
    grad_y, best_at, grad_x, size, height, width, grad_stride, channels, kernel: tl.constexpr, tile: tl.constexpr
):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    pixel = place // channels
    channel = place % channels
    column = pixel % width
    row = pixel // width % height
    total = tl.zeros((tile,), tl.float32)
    for down in tl.static_range(kernel):
        for right in tl.static_range(kernel):
            y_step, x_step = kernel // 2 - down, kernel // 2 - right
            inside = (row + y_step >= 0) & (row + y_step < height) & (column + x_step >= 0) & (column + x_step < width)
            reader = pixel + y_step * width + x_step
            at = tl.load(best_at + reader * channels + channel, mask=inside & (place < size), other=255)
            chosen = at.to(tl.int32) == down * kernel + right
            total += tl.load(grad_y + reader * grad_stride + channel, mask=chosen, other=0.0).to(tl.float32)
    tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask=place < size)


class MaxPool(torch.autograd.Function):
    """Max pooling with stride 1 and padding that keeps the size of features (N, C, H, W).

    Inputs: the features; the side of the window, odd, at most 15, because a position in the window is stored in one
    byte, and 255 denotes none.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, kernel: int) -> Tensor:
        """See the class."""
        features = features.contiguous(memory_format=torch.channels_last)
        _, channels, height, width = features.shape
        output = torch.empty_like(features)
        best_at = torch.empty_like(features, dtype=torch.uint8)
        size = features.numel()
        _max_pool_forward[(ceil_div(size, TILE),)](
            features, output, best_at, size, height, width, channels, kernel, TILE
        )
        ctx.save_for_backward(best_at)
        ctx.kernel, ctx.dtype = kernel, features.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient of the features."""
        (best_at,) = ctx.saved_tensors
        grad_output, grad_stride = _with_row_stride(grad_output)
        grad = torch.empty_like(best_at, dtype=ctx.dtype)
        _, channels, height, width = grad.shape
        size = grad.numel()
        _max_pool_backward[(ceil_div(size, TILE),)](
            grad_output, best_at, grad, size, height, width, grad_stride, channels, ctx.kernel, TILE
        )
        return grad, None


@triton.jit
def _upsample_forward(x, y, size, height, width, channels, factor: tl.constexpr, tile: tl.constexpr):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    pixel = place // channels
    column = pixel % width // factor
    row = pixel // width % height // factor
    source = ((pixel // width // height) * (height // factor) + row) * (width // factor) + column
    value = tl.load(x + source * channels + place % channels, mask=place < size, other=0.0)
    tl.store(y + place, value, mask=place < size)


@triton.jit
def _upsample_backward(
    grad_y, grad_x, size, height, width, grad_stride, channels, factor: tl.constexpr, tile: tl.constexpr
):
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    pixel = place // channels
    column = pixel % width * factor
    row = pixel // width * factor
    total = tl.zeros((tile,), tl.float32)
    for down in tl.static_range(factor):
        for right in tl.static_range(factor):
            reader = (row + down) * (width * factor) + column + right
            source = reader * grad_stride + place % channels
            total += tl.load(grad_y + source, mask=place < size, other=0.0).to(tl.float32)
    tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask=place < size)


class Upsample(torch.autograd.Function):
    """Nearest upsampling of features (N, C, H, W) by an integer factor."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: int) -> Tensor:
        """See the class."""
        features = features.contiguous(memory_format=torch.channels_last)
        count, channels, height, width = features.shape
        output = _empty((count, channels, height * factor, width * factor), features)
        size = output.numel()
        _upsample_forward[(ceil_div(size, TILE),)](
            features, output, size, height * factor, width * factor, channels, factor, TILE
        )
        ctx.shape, ctx.factor = features.shape, factor
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Compute the gradient of the features."""
        grad_output, grad_stride = _with_row_stride(grad_output)
        grad = _empty(ctx.shape, grad_output)
        _, channels, height, width = ctx.shape
        size = grad.numel()
        _upsample_backward[(ceil_div(size, TILE),)](
            grad_output, grad, size, height, width, grad_stride, channels, ctx.factor, TILE
        )
        return grad, None
