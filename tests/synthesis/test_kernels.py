# SPDX-License-Identifier: Apache-2.0
"""The fused kernels against PyTorch's own operators: on CUDA, and in Triton's interpreter where there is none."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.fused_kernels import HAS_TRITON
from mmzsq.patching import patched
from mmzsq.synthesis import batch_norm as batch_norm_module
from mmzsq.synthesis.batch_norm import BatchNormStatisticsCollector
from mmzsq.synthesis.priors import BNStatisticsPrior, directional_differences

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason='no Triton')

ACTIVATIONS = {0: lambda x: x, 1: F.relu, 2: F.silu}


def reference(features: Tensor, center: Tensor, scale: Tensor, bias: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    column = (1, -1, 1, 1)
    output = ACTIVATIONS[activation](features * scale.view(column) + bias.view(column))
    distance = features - center.view(column)
    return output, torch.stack((distance.sum((0, 2, 3)), distance.square().sum((0, 2, 3))))


def batch_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mmzsq.synthesis.kernels import BatchNormActivation, SumRows

    output, partial = BatchNormActivation.apply(*arguments)
    return output, SumRows.apply(partial)


def check(device: str) -> None:
    from mmzsq.synthesis.kernels import SumRows, TotalVariation, row_stride

    torch.manual_seed(0)
    for rows, columns in ((1, 3), (7, 32), (700, 40)):
        values = torch.randn(rows, 2, columns, device=device, requires_grad=True)
        direction = torch.randn(2, columns, device=device)
        results = [
            (total, *torch.autograd.grad(total, values, direction)) for total in (SumRows.apply(values), values.sum(0))
        ]
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    for channels in (3, 16, 24):
        for activation in ACTIVATIONS:
            features = torch.randn(2, channels, 9, 7, device=device).to(memory_format=torch.channels_last)
            constants = torch.randn(3, channels, device=device)
            # The gradient of a concatenation: part of a wider tensor, which must not be read as if it were dense.
            wide = torch.randn(2, channels + 8, 9, 7, device=device).to(memory_format=torch.channels_last)
            assert row_stride(wide[:, 4:-4]) == channels + 8
            grads = (wide[:, 4:-4], torch.randn(2, channels, device=device))
            results = []
            for function in (batch_norm, reference):
                x = features.clone().requires_grad_()
                outputs = function(x, *constants, activation)
                results.append((*outputs, *torch.autograd.grad(outputs, x, grads)))
            for value, expected in zip(*results, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    for shape in ((2, 3, 33, 29), (1, 3, 1, 5)):
        results = []
        for function in (TotalVariation.apply, directional_differences):
            images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
            images = images.to(memory_format=torch.channels_last).requires_grad_()
            value = function(images)
            results.append((value, *torch.autograd.grad(value, images)))
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    flat = torch.full((1, 3, 4, 4), 0.5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(TotalVariation.apply(flat), flat)
    assert not grad.any()


def check_layers(device: str) -> None:
    from mmzsq.synthesis.layer_kernels import ImageBlocks, MaxPool, Upsample

    torch.manual_seed(0)
    images = torch.rand(2, 3, 12, 18, device=device)
    features = torch.randn(2, 5, 7, 6, device=device)
    # Equal values: the gradient goes to the first.
    features[:, :, 2:5] = features[:, :, :1]
    for block, padded in ((2, 16), (3, 32), (1, 8)):
        blocks = F.pad(F.pixel_unshuffle(images, block), (0, 0, 0, 0, 0, padded - 3 * block**2))
        for layout in (torch.contiguous_format, torch.channels_last):
            compare(
                lambda x, block=block, padded=padded: ImageBlocks.apply(x, block, padded, torch.float32),
                lambda x, block=block, padded=padded: F.pad(
                    F.pixel_unshuffle(x, block), (0, 0, 0, 0, 0, padded - 3 * block**2)
                ),
                images.contiguous(memory_format=layout),
            )
        output = ImageBlocks.apply(images, block, padded, torch.bfloat16)
        # Triton's interpreter cuts off where a GPU rounds.
        torch.testing.assert_close(output, blocks.bfloat16(), rtol=2**-7, atol=0)
    for side in (1, 3, 5):
        compare(
            lambda x, side=side: MaxPool.apply(x, side),
            lambda x, side=side: F.max_pool2d(x, side, stride=1, padding=side // 2),
            features,
        )
    for factor in (2, 3):
        compare(
            lambda x, factor=factor: Upsample.apply(x, factor),
            lambda x, factor=factor: F.interpolate(x, scale_factor=factor, mode='nearest'),
            features,
        )
    broken = features.clone()
    broken[0, 0, 3, 3] = torch.nan
    assert MaxPool.apply(broken, 3).isnan().equal(F.max_pool2d(broken, 3, stride=1, padding=1).isnan())


def compare(function: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
    """Values and gradients, for output gradients that are dense, in the other layout, or a slice of a wider tensor."""
    inputs = inputs.clone().requires_grad_()
    output, expected = function(inputs), reference(inputs)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)
    batch, channels, *size = output.shape
    wide = torch.randn(batch, channels + 3, *size, device=inputs.device).to(memory_format=torch.channels_last)
    for grad in (torch.randn_like(output), torch.randn(output.shape, device=inputs.device), wide[:, 2:-1]):
        grads = [torch.autograd.grad(value, inputs, grad, retain_graph=True)[0] for value in (output, expected)]
        torch.testing.assert_close(*grads)


def test_kernels_compute_what_pytorch_does_in_the_interpreter() -> None:
    if torch.cuda.is_available():
        pytest.skip('compiled kernels are tested here')
    environment = dict(os.environ, TRITON_INTERPRET='1')
    command = [sys.executable, __file__]
    subprocess.run(command, env=environment, check=True, timeout=120)


@pytest.mark.cuda
def test_kernels_compute_what_pytorch_does() -> None:
    check('cuda')
    check_layers('cuda')


@pytest.mark.cuda
def test_kernels_accept_bf16_and_sum_in_fp32() -> None:
    features = torch.randn(8, 32, 40, 40, device='cuda').bfloat16().to(memory_format=torch.channels_last)
    constants = torch.randn(3, 32, device='cuda')
    output, sums = batch_norm(features, *constants, 2)
    expected, expected_sums = reference(features.double(), *constants.double(), 2)
    assert output.dtype == torch.bfloat16 and sums.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ('device', 'path'),
    [
        ('cpu', 'joint'),
        *(pytest.param('cuda', path, marks=pytest.mark.cuda) for path in ('joint', 'fused')),
    ],
)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_an_observed_network_has_the_outputs_statistics_and_gradient_of_the_plain_one(
    device: str, path: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcv.cnn import ConvModule

    norm = dict(type='BN', eps=1e-3)
    network = nn.Sequential(
        ConvModule(3, 16, 3, norm_cfg=norm, act_cfg=dict(type='SiLU')),
        ConvModule(16, 16, 3, norm_cfg=norm, act_cfg=dict(type='ReLU')),
        ConvModule(16, 8, 3, norm_cfg=norm, act_cfg=None),
    )
    network = network.to(device).eval().requires_grad_(False)
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    results = []
    # cuDNN would round to TF32, to other values in another layout.
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    replaceable = batch_norm_module._is_replaceable
    for taken in ('hooks', path):
        monkeypatch.setattr(batch_norm_module, 'HAS_TRITON', taken == 'fused')
        monkeypatch.setattr(
            batch_norm_module, '_is_replaceable', replaceable if taken != 'hooks' else lambda layer: False
        )
        prior = BNStatisticsPrior(form='kl', weight=1.0)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        images = images.to(device).contiguous(memory_format=layout).requires_grad_()
        prior.attach(network)
        if device == 'cpu' and taken == 'joint':
            # Only a GPU gains from it; what it computes is the same anywhere.
            prior.detach()
            prior._collector._forwards = {layer: prior._collector._joint_forward(layer) for layer in layers}
            prior._collector._resume()
        assert bool(prior._collector._forwards) == (taken != 'hooks')
        output = network(images)
        # The half of it, as a concatenation would hand on, has gaps.
        total = prior(images) + output[:, :4].square().mean()
        prior.detach()
        results.append((output, total, *torch.autograd.grad(total, images)))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-4)
    assert not any('forward' in vars(module) for module in network.modules())


def test_a_paused_collector_ignores_forwards_and_keeps_its_constants() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    collector = BatchNormStatisticsCollector()
    collector.attach(network)
    network(torch.rand(2, 3, 4, 4))
    assert collector.collect() is not None
    constants = dict(collector._constants)
    with collector.paused():
        network(torch.rand(2, 3, 4, 4))
    assert collector.collect() is None
    assert collector._constants == constants
    network(torch.rand(2, 3, 4, 4))
    assert collector.collect() is not None


def test_collectors_restore_the_forward_that_they_found() -> None:
    layer = nn.BatchNorm2d(3).eval()
    features = torch.rand(2, 3, 4, 4)

    def outer_forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    collector = BatchNormStatisticsCollector()
    with patched(layer, 'forward', outer_forward):
        # On a GPU, attach() patches the layer in this way.
        collector._forwards = {layer: collector._joint_forward(layer)}
        collector._resume()
        layer(features)
        assert collector.collect() is not None
        with collector.paused():
            assert torch.equal(layer(features), features + 1)
        layer(features)
        assert collector.collect() is not None
        collector.detach()
        collector.detach()
        assert torch.equal(layer(features), features + 1)
    assert 'forward' not in vars(layer)


if __name__ == '__main__':
    check('cpu')
    check_layers('cpu')
