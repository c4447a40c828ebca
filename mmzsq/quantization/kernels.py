# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for fake quantization on CUDA: one pass over memory in the forward and one in the backward.

The results equal those of :mod:`mmzsq.quantization.fake_quantize`, the reference in the tests, up to the order of
sums. The backward computes partial sums of the gradients of step and zero point in the same pass as the gradient of the
input, and adds them in a fixed order, so equal inputs give bitwise equal results. Import this module only if
:data:`mmzsq.fused_kernels.HAS_TRITON` is true.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1024
"""Values that one program processes at once."""
PROGRAMS = 2048
"""Approximate number of programs of a backward pass; each writes one partial sum."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23. Adding and then subtracting it rounds an fp32 number half to even."""


@triton.jit
def _levels(x, step, low, high):
    """Return real-valued levels and the clipped levels. A NaN stays a NaN."""
    levels = tl.div_rn(x, step)
    clipped = tl.where(levels < low, low, levels)
    return levels, tl.where(clipped > high, high, clipped)


@triton.jit
def _round(x):
    # This is exact for the clipped levels, which are at most 2^8.
    return (x + ROUND) - ROUND


@triton.jit
def _forward(x, y, steps, zero_points, qmin, qmax, size, tiles_each, has_zero_point: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(1)
    step = tl.load(steps + row)
    low = qmin + 0.0
    high = qmax + 0.0
    if has_zero_point:
        zero_point = tl.load(zero_points + row)
        low -= zero_point
        high -= zero_point
    start = row.to(tl.int64) * size
    for index in range(tiles_each):
        place = (tl.program_id(0) * tiles_each + index).to(tl.int64) * tile + tl.arange(0, tile)
        inside = place < size
        value = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        _, clipped = _levels(value, step, low, high)
        tl.store(y + start + place, (_round(clipped) * step).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, grad_y, grad_x, partial, steps, zero_points, qmin, qmax, scale, size, tiles_each, chunks, rows,
    has_zero_point: tl.constexpr, needs_x: tl.constexpr, needs_zero_point: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    step = tl.load(steps + row)
    low = qmin + 0.0
    high = qmax + 0.0
    if has_zero_point:
        zero_point = tl.load(zero_points + row)
        low -= zero_point
        high -= zero_point
    start = row.to(tl.int64) * size
    of_step = tl.zeros((tile,), tl.float32)
    of_zero_point = tl.zeros((tile,), tl.float32)
    for index in range(tiles_each):
        place = (tl.program_id(0) * tiles_each + index).to(tl.int64) * tile + tl.arange(0, tile)
        inside = place < size
        value = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + start + place, mask=inside, other=0.0).to(tl.float32)
        levels, clipped = _levels(value, step, low, high)
        kept = clipped == levels
        if needs_x:
            tl.store(grad_x + start + place, tl.where(kept, grad, 0.0).to(grad_x.dtype.element_ty), mask=inside)
        of_step += (_round(clipped) - tl.where(kept, levels, 0.0)) * grad
        if needs_zero_point:
            of_zero_point += tl.where(kept, 0.0, grad)
    chunk = row * chunks + tl.program_id(0)
    tl.store(partial + chunk, tl.sum(of_step, axis=0) * scale)
    if needs_zero_point:
        tl.store(partial + rows * chunks + chunk, tl.sum(of_zero_point, axis=0) * -scale * step)


def can_fuse(x: Tensor, step: Tensor, zero_point: Tensor | None) -> bool:
    """Return whether the kernels support these arguments of ``fake_quantize``.

    ``x`` may be fp32, bf16 or fp16, in any dense layout. There may be one step, or one for each slice of the first
    dimension if each slice is contiguous in memory. ``step`` and ``zero_point`` must be fp32.
    """
    rows = step.numel()
    if not x.numel() or x.dtype not in FLOATS or step.dtype != torch.float32:
        return False
    if zero_point is not None and (zero_point.dtype != torch.float32 or zero_point.numel() != rows):
        return False
    if rows == 1:
        return _is_dense(x)
    by_row = x.dim() == step.dim() and step.shape[0] == rows == x.shape[0]
    return by_row and x.stride(0) == x.numel() // rows and _is_dense(x)


def _is_dense(x: Tensor) -> bool:
    """Return whether the values of ``x`` fill their memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class FusedFakeQuantize(torch.autograd.Function):
    """Fake quantization by Triton kernels, for arguments that :func:`can_fuse` accepts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, grad_scale: float
    ) -> Tensor:
        """Return the rounded values, in the type and layout of ``x``."""
        rows = step.numel()
        size = x.numel() // rows
        tiles = math.ceil(size / TILE)
        tiles_each = math.ceil(tiles * rows / (8 * PROGRAMS))
        output = torch.empty_like(x)
        _forward[(math.ceil(tiles / tiles_each), rows)](
            x, output, step, zero_point, qmin, qmax, size, tiles_each, zero_point is not None, TILE
        )
        ctx.save_for_backward(x, step, zero_point)
        ctx.qmin, ctx.qmax, ctx.grad_scale = qmin, qmax, grad_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Return the gradients of ``x``, ``step`` and ``zero_point``."""
        x, step, zero_point = ctx.saved_tensors
        needs_x, needs_step, needs_zero_point = ctx.needs_input_grad[:3]
        if grad_output.stride() != x.stride():
            # The kernel reads both in memory order.
            grad_output = torch.empty_like(x, dtype=grad_output.dtype).copy_(grad_output)
        rows = step.numel()
        size = x.numel() // rows
        tiles = math.ceil(size / TILE)
        tiles_each = math.ceil(tiles * rows / PROGRAMS)
        chunks = math.ceil(tiles / tiles_each)
        grad_x = torch.empty_like(x) if needs_x else None
        partial = torch.empty((1 + needs_zero_point, rows, chunks), dtype=torch.float32, device=x.device)
        _backward[(chunks, rows)](
            x, grad_output, grad_x, partial, step, zero_point, ctx.qmin, ctx.qmax, ctx.grad_scale, size, tiles_each,
            chunks, rows, zero_point is not None, needs_x, needs_zero_point, TILE,
        )  # fmt: skip
        sums = partial.sum(-1) if chunks > 1 else partial
        grad_step = sums[0].view(step.shape) if needs_step else None
        grad_zero_point = sums[1].view(step.shape) if needs_zero_point else None
        return grad_x, grad_step, grad_zero_point, None, None, None
