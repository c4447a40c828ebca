# SPDX-License-Identifier: Apache-2.0
"""The fused kernels against PyTorch's own operators: on CUDA, and in Triton's interpreter where there is none."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.synthesis.batch_norm import HAS_TRITON, BatchNormWatch
from mmzsq.synthesis.priors import BNStatisticsPrior, directional_differences

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason='no Triton')

ACTIVATIONS = {0: lambda x: x, 1: F.relu, 2: F.silu}


def reference(features: Tensor, centre: Tensor, scale: Tensor, bias: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    column = (1, -1, 1, 1)
    output = ACTIVATIONS[activation](features * scale.view(column) + bias.view(column))
    distance = features - centre.view(column)
    return output, torch.stack((distance.sum((0, 2, 3)), distance.square().sum((0, 2, 3))))


def check(device: str) -> None:
    from mmzsq.synthesis.kernels import BatchNormActivation, TotalVariation, row_stride, sum_rows

    torch.manual_seed(0)
    for rows, columns in ((1, 3), (7, 32), (700, 40)):
        values = torch.randn(rows, 2, columns, device=device)
        torch.testing.assert_close(sum_rows(values), values.sum(0), rtol=1e-4, atol=1e-4)
    for channels in (3, 16, 24):
        for activation in ACTIVATIONS:
            features = torch.randn(2, channels, 9, 7, device=device).to(memory_format=torch.channels_last)
            constants = torch.randn(3, channels, device=device)
            # The gradient of a concatenation: part of a wider tensor, which must not be read as if it were dense.
            wide = torch.randn(2, channels + 8, 9, 7, device=device).to(memory_format=torch.channels_last)
            assert row_stride(wide[:, 4:-4]) == channels + 8
            grads = (wide[:, 4:-4], torch.randn(2, channels, device=device))
            results = []
            for function in (BatchNormActivation.apply, reference):
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


def test_kernels_compute_what_pytorch_does_in_the_interpreter() -> None:
    if torch.cuda.is_available():
        pytest.skip('compiled kernels are tested here')
    environment = dict(os.environ, TRITON_INTERPRET='1')
    command = [sys.executable, __file__]
    subprocess.run(command, env=environment, check=True, timeout=120)


@pytest.mark.cuda
def test_kernels_compute_what_pytorch_does() -> None:
    check('cuda')


@pytest.mark.cuda
def test_kernels_take_bf16_and_sum_in_fp32() -> None:
    from mmzsq.synthesis.kernels import BatchNormActivation

    features = torch.randn(8, 32, 40, 40, device='cuda').bfloat16().to(memory_format=torch.channels_last)
    constants = torch.randn(3, 32, device='cuda')
    output, sums = BatchNormActivation.apply(features, *constants, 2)
    expected, expected_sums = reference(features.double(), *constants.double(), 2)
    assert output.dtype == torch.bfloat16 and sums.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-4, atol=1e-2)


@pytest.mark.cuda
def test_a_fused_network_has_the_outputs_statistics_and_gradient_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmcv.cnn import ConvModule

    norm = dict(type='BN', eps=1e-3)
    network = nn.Sequential(
        ConvModule(3, 16, 3, norm_cfg=norm, act_cfg=dict(type='SiLU')),
        ConvModule(16, 16, 3, norm_cfg=norm, act_cfg=dict(type='ReLU')),
        ConvModule(16, 8, 3, norm_cfg=norm, act_cfg=None),
    )
    network = network.cuda().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    results = []
    # cuDNN would round to TF32, to other values in another layout.
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    for fused in (False, True):
        monkeypatch.setattr('mmzsq.synthesis.batch_norm.HAS_TRITON', fused)
        prior = BNStatisticsPrior(form='kl', weight=1.0)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
        prior.attach(network)
        assert bool(prior._watch._forwards) == fused
        output = network(images)
        total = prior(images) + output.square().mean()
        prior.detach()
        results.append((output, total, *torch.autograd.grad(total, images)))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-4)
    assert not any('forward' in vars(module) for module in network.modules())


def test_a_paused_watch_sees_nothing_and_keeps_its_constants() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    watch = BatchNormWatch()
    watch.attach(network)
    network(torch.rand(2, 3, 4, 4))
    assert watch.collect() is not None
    constants = dict(watch._layouts)
    with watch.paused():
        network(torch.rand(2, 3, 4, 4))
    assert watch.collect() is None
    assert watch._layouts == constants
    network(torch.rand(2, 3, 4, 4))
    assert watch.collect() is not None


if __name__ == '__main__':
    check('cpu')
