# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with frozen statistics and trained scale and bias, with a fast backward on GPUs.

PyTorch's backward of BatchNorm in eval mode runs one thread block per channel. It leaves most of a GPU idle if maps are
large and channels few, as in the first layers of a detector, and takes a quarter of a training step of YOLOv5-n. The
backward here consists of elementwise products and reductions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class FrozenBatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a faster backward in eval mode on a GPU. State and results are the same."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize a map.

        Args:
            input: Shape (N, C, H, W).
        """
        learns = torch.is_grad_enabled() and self.affine
        if self.training or not input.is_cuda or not learns or self.running_mean is None:
            return super().forward(input)
        return _FrozenBatchNorm.apply(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(features, weight, mean, variance)
        ctx.eps = eps
        return F.batch_norm(features, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        features, weight, mean, variance = ctx.saved_tensors
        needs_features, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        inverse = torch.rsqrt(variance + ctx.eps)
        grad_features = grad_weight = grad_bias = None
        if needs_features:
            scale = (weight * inverse).view(-1, 1, 1)
            grad_features = grad_output * scale.to(grad_output.dtype)
        if needs_weight or needs_bias:
            total = grad_output.sum((0, 2, 3), dtype=torch.float32)
        if needs_weight:
            # Centers before the sum: with a mean far from zero, the result would be a difference of large sums.
            near = mean.to(features.dtype)
            grad_weight = (grad_output * (features - near.view(-1, 1, 1))).sum((0, 2, 3), dtype=torch.float32)
            # Corrects the rounding of the mean to bf16, which the sum over pixels would multiply.
            grad_weight = (grad_weight + (near.float() - mean) * total) * inverse
        if needs_bias:
            grad_bias = total
        return grad_features, grad_weight, grad_bias, None, None, None


def speed_up_frozen_batch_norm(model: nn.Module) -> None:
    """Turn each ``nn.BatchNorm2d`` of ``model`` into a :class:`FrozenBatchNorm` in place, with its state.

    Args:
        model: Any network. Subclasses of ``nn.BatchNorm2d`` are left as they are.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm
