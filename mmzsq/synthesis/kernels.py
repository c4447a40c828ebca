# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels of the synthesis step for CUDA.

Memory bandwidth limits the step, and PyTorch needs many passes over memory. BatchNorm in eval mode, the activation that
follows, and the batch statistics read the same features. They are fused into one pass forward and one backward. The
four norms of the total variation take one pass each way over the images. Sums have a fixed order, so equal inputs give
equal bits.

Each kernel computes the same as a plain PyTorch function in :mod:`mmzsq.synthesis.batch_norm` or
:mod:`mmzsq.synthesis.priors`, its reference in the tests. Import this module only where
:data:`mmzsq.fused_kernels.HAS_TRITON` is true.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096
"""Number of values that one program processes at a time."""

PROGRAMS = 1024
"""Maximum number of programs of the total variation divided by 4; each program leaves one partial sum."""

BATCH_NORM_TILE = 2048
"""Number of values that one BatchNorm program processes at a time; it also holds two sums for each of them."""

BATCH_NORM_PROGRAMS = 528
"""Number of BatchNorm programs for a layer of any size, so that one reduction can sum all layers."""

SUM_COLUMNS = 16
"""Number of columns that one program sums."""

MAX_VALUES = 2**31 - TILE
"""Maximum number of values of a tensor whose kernel divides its indices, which are therefore 32-bit."""


def ceil_div(value: int, divisor: int) -> int:
    """Return ``value / divisor``, rounded up."""
    return -(-value // divisor)


@triton.jit
def _batch_norm_forward(
    x, y, partial, shift, scale, bias, rows, channels: tl.constexpr, block_rows: tl.constexpr,
    block_channels: tl.constexpr, activation: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, block_channels)
    is_column = column < channels
    center = tl.load(shift + column, mask=is_column, other=0.0)
    slope = tl.load(scale + column, mask=is_column, other=0.0)
    offset = tl.load(bias + column, mask=is_column, other=0.0)
    # Reduce once at the end: a reduction in each tile would synchronize all threads each time.
    total = tl.zeros((block_rows, block_channels), tl.float32)
    squares = tl.zeros((block_rows, block_channels), tl.float32)
    step = tl.num_programs(0) * block_rows
    row = program * block_rows + tl.arange(0, block_rows)
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    inside = (row < rows)[:, None] & is_column[None, :]
    loaded = tl.load(x + place, mask=inside, other=0.0)
    for _ in range(program * block_rows, rows, step):
        # Load the next tile while this one is processed.
        next_row = row + step
        next_place = next_row.to(tl.int64)[:, None] * channels + column[None, :]
        next_inside = (next_row < rows)[:, None] & is_column[None, :]
        next_loaded = tl.load(x + next_place, mask=next_inside, other=0.0)
        value = loaded.to(tl.float32)
        distance = tl.where(inside, value - center[None, :], 0.0)
        total += distance
        squares += distance * distance
        normal = value * slope[None, :] + offset[None, :]
        if activation == 1:
            normal = tl.maximum(normal, 0.0)
        if activation == 2:
            normal = normal * tl.sigmoid(normal)
        tl.store(y + place, normal.to(y.dtype.element_ty), mask=inside)
        row, place, inside, loaded = next_row, next_place, next_inside, next_loaded
    tl.store(partial + (program * 2) * channels + column, tl.sum(total, axis=0), mask=is_column)
    tl.store(partial + (program * 2 + 1) * channels + column, tl.sum(squares, axis=0), mask=is_column)


@triton.jit
def _sum_rows(x, y, rows, columns, block_rows: tl.constexpr, block_columns: tl.constexpr):
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    is_column = column < columns
    total = tl.zeros((block_columns,), tl.float32)
    for first in range(0, rows, block_rows):
        row = first + tl.arange(0, block_rows)
        inside = (row < rows)[:, None] & is_column[None, :]
        total += tl.sum(tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0), axis=0)
    tl.store(y + column, total, mask=is_column)


class SumRows(torch.autograd.Function):
    """Sum of fp32 values (N, ...) over N in a fixed order, for hundreds of rows with a large number of columns."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """See the class."""
        output = torch.empty(values.shape[1:], dtype=torch.float32, device=values.device)
        columns = output.numel()
        _sum_rows[(ceil_div(columns, SUM_COLUMNS),)](
            values, output, len(values), columns, TILE // SUM_COLUMNS, SUM_COLUMNS
        )
        ctx.rows = len(values)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        """Expand the gradient to all rows."""
        return grad_output.expand(ctx.rows, *grad_output.shape)


@triton.jit
def _batch_norm_backward(
    x, grad_y, grad_x, grad_sums, shift, scale, bias, rows, grad_stride, sums_stride, channels: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr, activation: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block_channels)
    is_column = column < channels
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    inside = (row < rows)[:, None] & is_column[None, :]
    place = row.to(tl.int64)[:, None] * channels + column[None, :]
    center = tl.load(shift + column, mask=is_column, other=0.0)
    slope = tl.load(scale + column, mask=is_column, other=0.0)
    offset = tl.load(bias + column, mask=is_column, other=0.0)
    of_total = tl.load(grad_sums + column, mask=is_column, other=0.0)
    of_squares = tl.load(grad_sums + sums_stride + column, mask=is_column, other=0.0)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    grad_place = row.to(tl.int64)[:, None] * grad_stride + column[None, :]
    grad = tl.load(grad_y + grad_place, mask=inside, other=0.0).to(tl.float32)
    normal = value * slope[None, :] + offset[None, :]
    if activation == 1:
        grad = tl.where(normal > 0.0, grad, 0.0)
    if activation == 2:
        gate = tl.sigmoid(normal)
        grad = grad * gate * (1.0 + normal * (1.0 - gate))
    result = grad * slope[None, :] + of_total[None, :] + 2.0 * of_squares[None, :] * (value - center[None, :])
    tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)


class BatchNormActivation(torch.autograd.Function):
    """BatchNorm in eval mode with its activation, and partial sums for the batch statistics of its input.

    Inputs: features (N, C, H, W), channels_last; center of the statistics, scale and bias of each channel, fp32 (C,),
    without gradient; activation: 0 for none, 1 for ReLU, 2 for SiLU.

    Outputs: ``activation(features * scale + bias)``, in the type of the features; and partial sums, fp32
    (:data:`BATCH_NORM_PROGRAMS`, 2, C), whose sum over the programs is that of ``features - center`` and of its square
    over (N, H, W). Pass them to :class:`SumRows`, for all layers at once; gradients of other uses are not supported.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, center: Tensor, scale: Tensor, bias: Tensor, activation: int
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = features.contiguous(memory_format=torch.channels_last)
        channels = features.shape[1]
        rows = features.numel() // channels
        block_channels = triton.next_power_of_2(channels)
        block_rows = max(BATCH_NORM_TILE // block_channels, 1)
        output = torch.empty_like(features)
        partial = torch.empty((BATCH_NORM_PROGRAMS, 2, channels), dtype=torch.float32, device=features.device)
        _batch_norm_forward[(BATCH_NORM_PROGRAMS,)](
            features, output, partial, center, scale, bias, rows, channels, block_rows, block_channels, activation
        )
        ctx.save_for_backward(features, center, scale, bias)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return output, partial

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_partial: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        """Compute the gradient of the features.

        Raises:
            RuntimeError: If the gradient of the partial sums does not come from :class:`SumRows`.
        """
        features, center, scale, bias = ctx.saved_tensors
        channels = features.shape[1]
        rows = features.numel() // channels
        block_channels = triton.next_power_of_2(channels)
        block_rows = max(TILE // block_channels, 1)
        grad = torch.empty_like(features)
        if grad_output is None:
            grad_output = torch.zeros_like(features)
        if grad_partial is None:
            grad_partial = center.new_zeros(2, channels).expand(BATCH_NORM_PROGRAMS, 2, channels)
        grad_stride = row_stride(grad_output)
        if grad_stride is None:
            grad_output = grad_output.contiguous(memory_format=torch.channels_last)
            grad_stride = channels
        if grad_partial.stride(0) != 0 or grad_partial.stride(2) != 1:
            raise RuntimeError('partial sums must be reduced by SumRows')
        _batch_norm_backward[(ceil_div(rows, block_rows),)](
            features, grad_output, grad, grad_partial, center, scale, bias, rows, grad_stride, grad_partial.stride(1),
            channels, block_rows, block_channels, ctx.activation, num_warps=8,
        )  # fmt: skip
        return grad, None, None, None, None


def row_stride(features: Tensor) -> int | None:
    """Return the distance in memory between neighboring pixels of features (N, C, H, W).

    The distance exceeds C for a slice of the channels of a wider tensor, so that the gradient of a concatenation needs
    no copy.

    Returns:
        Number of values; None unless the channels of a pixel are contiguous and pixels are evenly spaced.
    """
    _, _, height, width = features.shape
    batch, channel, row, column = features.stride()
    evenly = (row == width * column or height == 1) and (batch == height * width * column or len(features) == 1)
    return column if channel == 1 and column > 1 and evenly else None


@triton.jit
def _difference(x, value, place, inside):
    return tl.where(inside, value - tl.load(x + place, mask=inside, other=0.0), 0.0)


@triton.jit
def _total_variation_forward(x, partial, size, height, width, tiles_each, channels: tl.constexpr, block: tl.constexpr):
    program = tl.program_id(0)
    vertical = tl.zeros((block,), tl.float32)
    horizontal = tl.zeros((block,), tl.float32)
    diagonal = tl.zeros((block,), tl.float32)
    anti_diagonal = tl.zeros((block,), tl.float32)
    for tile in range(tiles_each):
        place = (program * tiles_each + tile) * block + tl.arange(0, block)
        inside = place < size
        column = (place // channels) % width
        row = (place // channels // width) % height
        value = tl.load(x + place, mask=inside, other=0.0)
        below = inside & (row > 0)
        step = width * channels
        d = _difference(x, value, place - step, below)
        vertical += d * d
        d = _difference(x, value, place - channels, inside & (column > 0))
        horizontal += d * d
        d = _difference(x, value, place - step - channels, below & (column > 0))
        diagonal += d * d
        d = _difference(x, value, place - step + channels, below & (column < width - 1))
        anti_diagonal += d * d
    tl.store(partial + program * 4 + 0, tl.sum(vertical, axis=0))
    tl.store(partial + program * 4 + 1, tl.sum(horizontal, axis=0))
    tl.store(partial + program * 4 + 2, tl.sum(diagonal, axis=0))
    tl.store(partial + program * 4 + 3, tl.sum(anti_diagonal, axis=0))


@triton.jit
def _total_variation_backward(x, grad, factors, size, height, width, channels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size
    column = (place // channels) % width
    row = (place // channels // width) % height
    value = tl.load(x + place, mask=inside, other=0.0)
    above, below = inside & (row < height - 1), inside & (row > 0)
    left, right = column > 0, column < width - 1
    step = width * channels
    result = tl.load(factors + 0) * (
        _difference(x, value, place - step, below) + _difference(x, value, place + step, above)
    )
    result += tl.load(factors + 1) * (
        _difference(x, value, place - channels, inside & left) + _difference(x, value, place + channels, inside & right)
    )
    result += tl.load(factors + 2) * (
        _difference(x, value, place - step - channels, below & left)
        + _difference(x, value, place + step + channels, above & right)
    )
    result += tl.load(factors + 3) * (
        _difference(x, value, place - step + channels, below & right)
        + _difference(x, value, place + step - channels, above & left)
    )
    tl.store(grad + place, result, mask=inside)


class TotalVariation(torch.autograd.Function):
    """Sum of the Frobenius norms of the four directional differences of images (N, C, H, W), fp32, channels_last."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        """Return the sum, a scalar."""
        images = images.contiguous(memory_format=torch.channels_last)
        channels, height, width = images.shape[1:]
        block = TILE // 4
        tiles_each = ceil_div(ceil_div(images.numel(), block), 4 * PROGRAMS)
        programs = ceil_div(images.numel(), block * tiles_each)
        partial = torch.empty((programs, 4), dtype=torch.float32, device=images.device)
        _total_variation_forward[(programs,)](
            images, partial, images.numel(), height, width, tiles_each, channels, block
        )
        norms = partial.sum(0).sqrt()
        ctx.save_for_backward(images, norms)
        return norms.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        """Compute the gradient of the images; a norm of 0 contributes 0."""
        images, norms = ctx.saved_tensors
        channels, height, width = images.shape[1:]
        block = TILE // 4
        grad = torch.empty_like(images)
        # If a norm is 0, all of its differences are 0.
        factors = grad_output * norms.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
        _total_variation_backward[(ceil_div(images.numel(), block),)](
            images, grad, factors, images.numel(), height, width, channels, block
        )
        return grad
