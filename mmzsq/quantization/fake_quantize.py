# SPDX-License-Identifier: Apache-2.0
"""Fake quantization with a learned step size, as pure functions of tensors.

    y = s * clip(round(x / s), qmin - z, qmax - z)

``s > 0`` is a real step and ``z`` an integer zero point, so zero is always on the grid. Integer hardware computes
``clip(round(x / s) + z, qmin, qmax)`` (ONNX ``QuantizeLinear``, which rounds half to even). The backward follows Esser
et al., "Learned Step Size Quantization", 2019, https://arxiv.org/abs/1902.08153, equations 3 and 5. The gradient of the
zero point is that of Bhalgat et al., "LSQ+", 2020, https://arxiv.org/abs/2004.09576, in integer units.

The math runs in fp32 for every type of ``x``. On CUDA, :mod:`mmzsq.quantization.kernels` fuses it into one kernel for
the forward and one for the backward. Tests compare them with the functions of this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmzsq.fused_kernels import HAS_TRITON, fused_kernels_enabled


def fake_quantize(
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    zero_point: Tensor | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Round ``x`` to the grid of an integer type, with gradients for the grid.

    Gradients, with ``dy`` the gradient of the output:

    * ``x``: ``dy`` inside the range (straight-through), zero outside.
    * ``step``: the sum of ``grad_scale * dy * d``, where ``d`` is ``qmin - z`` below the range, ``qmax - z`` above it
      and ``round(x/s) - x/s`` inside.
    * ``zero_point``: the sum of ``-grad_scale * dy * s`` over the clipped elements.

    Args:
        x: Real values of any floating type and shape.
        step: Width of one level, positive, fp32. It has as many dimensions as ``x`` and is broadcastable to it:
            (1, 1, 1, 1) for one step, (C, 1, 1, 1) for one per output channel.
        qmin: Lowest integer.
        qmax: Highest integer.
        zero_point: The integer that represents zero, in fp32, shaped as ``step``; ``None`` means zero.
        grad_scale: Factor on the gradients of ``step`` and ``zero_point``.

    Returns:
        The rounded values, in the type and shape of ``x``.

    Example:
        >>> x = torch.tensor([-0.9, -0.3, 0.0, 0.26, 5.0])
        >>> fake_quantize(x, torch.tensor([0.5]), qmin=-2, qmax=1)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  0.5000])
    """
    function = _function_for(x, step, zero_point)
    output: Tensor = function.apply(x, step, zero_point, qmin, qmax, grad_scale)
    return output


def _function_for(x: Tensor, step: Tensor, zero_point: Tensor | None) -> type[torch.autograd.Function]:
    """Return the fused function if it can run, else the plain one, which ``torch.compile`` fuses by itself."""
    if x.is_cuda and HAS_TRITON and fused_kernels_enabled() and not torch.compiler.is_compiling():
        from mmzsq.quantization import kernels

        if kernels.can_fuse(x, step, zero_point):
            return kernels.FusedFakeQuantize
    return _FakeQuantize


def quantize(x: Tensor, step: Tensor, qmin: int, qmax: int, zero_point: Tensor | None = None) -> Tensor:
    """Return the integers that :func:`fake_quantize` simulates.

    Args:
        x: Real values.
        step: See :func:`fake_quantize`.
        qmin: Lowest integer.
        qmax: Highest integer.
        zero_point: See :func:`fake_quantize`.

    Returns:
        ``clip(round(x / step) + zero_point, qmin, qmax)`` as int32, shaped as ``x``. The output of
        :func:`fake_quantize` is ``(integers - zero_point) * step``.

    Example:
        >>> x = torch.tensor([-0.9, -0.3, 0.0, 0.26, 5.0])
        >>> quantize(x, torch.tensor([0.5]), qmin=0, qmax=3, zero_point=torch.tensor([1.0]))
        tensor([0, 0, 1, 2, 3], dtype=torch.int32)
    """
    integers = torch.round(x.detach() / step.detach())
    if zero_point is not None:
        integers = integers + zero_point.detach()
    return integers.clamp(qmin, qmax).to(torch.int32)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def clamp_ste(x: Tensor, low: float, high: float | None = None) -> Tensor:
    """Clamp, with the gradient of the identity, so that a parameter at a bound can leave it."""
    return x + (x.clamp(low, high) - x).detach()


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization in plain PyTorch. It saves only its inputs and computes the masks in the backward.

    Nothing is written in place and no output is an alias: on torch 2.11, a compiled forward that ends in ``mul_`` or in
    a ``to`` without effect silently gets a step gradient of zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.qmin, ctx.qmax, ctx.grad_scale = qmin, qmax, grad_scale
        # A step that has dimensions promotes a bf16 ``x`` to fp32 in the division.
        output = _clip(torch.round(x / step), zero_point, qmin, qmax) * step
        return output if output.dtype == x.dtype else output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, step, zero_point = ctx.saved_tensors
        needs_x, needs_step, needs_zero_point = ctx.needs_input_grad[:3]
        levels = x / step
        clipped = _clip(levels, zero_point, ctx.qmin, ctx.qmax)
        inside = clipped == levels
        grad_x = grad_step = grad_zero_point = None
        if needs_x:
            grad_x = grad_output * inside
        if needs_step:
            slope = torch.round(clipped) - levels * inside
            grad_step = (slope * grad_output).sum_to_size(step.shape) * ctx.grad_scale
        if needs_zero_point:
            outside = grad_output.float() * ~inside
            grad_zero_point = outside.sum_to_size(step.shape) * step * -ctx.grad_scale
        return grad_x, grad_step, grad_zero_point, None, None, None


def _clip(levels: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Clip real-valued levels to the integer range, less the zero point."""
    if zero_point is None:
        return levels.clamp(qmin, qmax)
    return levels.clamp(qmin - zero_point, qmax - zero_point)
