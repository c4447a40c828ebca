# SPDX-License-Identifier: Apache-2.0
"""Accelerated layers compute the same as the original ones."""

import pytest
import torch
from torch import nn

from mmzsq.synthesis.acceleration import Acceleration, _FirstChannels, fast_convolution


@pytest.mark.parametrize(
    ('kernel', 'stride', 'padding'),
    [(6, 2, 2), (7, 2, 3), (3, 2, 1), (4, 4, 0), (3, 3, 0), (5, 2, 0), (16, 16, 0), ((3, 5), 2, (1, 2))],
)
def test_a_strided_convolution_of_an_image_equals_one_of_its_blocks(kernel: int, stride: int, padding: int) -> None:
    layer = nn.Conv2d(3, 8, kernel, stride, padding).requires_grad_(False)
    images = torch.rand(2, 3, 96, 144, requires_grad=True)
    expected, output = layer(images), fast_convolution(layer, torch.float32)(images)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    grads = (torch.autograd.grad(value, images, direction)[0] for value in (output, expected))
    torch.testing.assert_close(*grads)


def test_images_not_divisible_by_the_stride_use_the_original_convolution() -> None:
    layer = nn.Conv2d(3, 8, 4, 4)
    images = torch.rand(1, 3, 30, 34)
    assert torch.equal(fast_convolution(layer, torch.float32)(images), layer(images))


@pytest.mark.parametrize('options', [dict(bias=True), dict(bias=False), dict(groups=5, stride=2, padding=1)])
def test_output_channels_are_padded_and_cut(options: dict) -> None:
    layer = nn.Conv2d(20, 255, 3, **options).requires_grad_(False)
    features = torch.rand(2, 20, 8, 8, requires_grad=True)
    output, expected = fast_convolution(layer, torch.float32)(features), layer(features)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    grads = (torch.autograd.grad(value, features, direction)[0] for value in (output, expected))
    torch.testing.assert_close(*grads)


def test_the_gradient_of_padded_channels_is_zero_and_keeps_its_layout() -> None:
    features = torch.rand(2, 8, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    direction = torch.randn(2, 5, 4, 6).contiguous(memory_format=torch.channels_last)
    grads = []
    features.register_hook(grads.append)
    _FirstChannels.apply(features, 5).backward(direction)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(grads[0][:, :5], direction)
    assert not grads[0][:, 5:].any()


def test_layers_are_fast_inside_the_block_and_themselves_outside() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).requires_grad_(False)
    images = torch.rand(2, 3, 8, 8)
    expected = network(images)
    layers = Acceleration(network, torch.bfloat16)
    with layers():
        output = network(images)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.02)
    assert torch.equal(network(images), expected)


def test_nested_accelerations_restore_each_other() -> None:
    network, images = nn.Sequential(nn.Conv2d(3, 4, 1)).requires_grad_(False), torch.rand(1, 3, 4, 4)
    with Acceleration(network, torch.bfloat16)():
        with Acceleration(network, torch.float32)():
            assert network(images).dtype == torch.float32
        assert network(images).dtype == torch.bfloat16
    assert network(images).dtype == torch.float32
    assert 'forward' not in vars(network[0])


def test_a_subclass_that_computes_something_else_is_left_alone() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    network, images = Doubled(3, 4, 1), torch.rand(1, 3, 4, 4)
    expected = network(images)
    with Acceleration(network, torch.float32)():
        assert torch.equal(network(images), expected)
