# SPDX-License-Identifier: Apache-2.0
"""The backward of frozen BatchNorm matches that of PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmzsq.qat.frozen_batch_norm import FrozenBatchNorm, _FrozenBatchNorm, speed_up_frozen_batch_norm


def layer(channels: int = 5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3).eval()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        # Far from zero compared with its deviation.
        norm.running_mean.normal_(100, 10)
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_pytorch(memory_format: torch.memory_format) -> None:
    norm = layer()
    x = (100 + torch.randn(3, 5, 6, 7)).to(memory_format=memory_format)
    grad = torch.randn_like(x)
    results = []
    for apply in (
        norm,
        lambda x: _FrozenBatchNorm.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
    ):
        leaf = x.clone().requires_grad_()
        output = apply(leaf)
        results.append((output, *torch.autograd.grad(output, (leaf, norm.weight, norm.bias), grad)))
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_a_mean_that_rounds_in_bf16_leaves_no_error() -> None:
    norm = layer()
    with torch.no_grad():
        norm.running_mean.fill_(100.2)  # 100 in bf16
    x = (100 + torch.randn(4, 5, 20, 20)).bfloat16()
    # All of one sign, so that errors of the mean add up.
    grad = torch.rand_like(x)
    expected = torch.autograd.grad(norm(x.float()), (norm.weight, norm.bias), grad.float())
    output = _FrozenBatchNorm.apply(
        x.requires_grad_(), norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
    )
    torch.testing.assert_close(
        torch.autograd.grad(output, (norm.weight, norm.bias), grad), expected, rtol=1e-2, atol=1.0
    )


def test_a_fixed_scale_gets_no_gradient() -> None:
    norm = layer().requires_grad_(False)
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    output = _FrozenBatchNorm.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    output.sum().backward()
    assert norm.weight.grad is None and norm.bias.grad is None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    torch.testing.assert_close(x.grad, factor.view(-1, 1, 1).expand_as(x))


def test_a_model_keeps_its_layers_names_and_modes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), layer(), nn.GroupNorm(1, 5))
    before, norm = copy.deepcopy(model), model[1]
    speed_up_frozen_batch_norm(model)
    assert model[1] is norm and type(norm) is FrozenBatchNorm and isinstance(norm, nn.BatchNorm2d)
    assert model.state_dict().keys() == before.state_dict().keys()
    x = torch.rand(2, 3, 4, 4)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), before.train(training)(x))
    torch.testing.assert_close(model.state_dict(), before.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_a_gpu_only_frozen_layers_use_the_backward(dtype: torch.dtype) -> None:
    norm = layer(16).cuda()
    x = (100 + torch.randn(4, 16, 20, 20, device='cuda')).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    # PyTorch's in fp32: its own in bf16 rounds.
    exact = x.detach().float().requires_grad_()
    expected = torch.autograd.grad(norm(exact), (exact, norm.weight, norm.bias), grad.float())
    speed_up_frozen_batch_norm(norm)
    output = norm(x)
    assert type(output.grad_fn).__name__ == '_FrozenBatchNormBackward'
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    results = torch.autograd.grad(output, (x, norm.weight, norm.bias), grad)
    assert [value.dtype for value in results] == [dtype, torch.float32, torch.float32]
    for value, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(value.float(), reference, rtol=tolerance, atol=tolerance * 20)
    assert type(norm.train()(x).grad_fn).__name__ != '_FrozenBatchNormBackward'
