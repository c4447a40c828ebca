# SPDX-License-Identifier: Apache-2.0
"""Quantized layers compute the same as their float classes, on quantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.quantization import QuantConvTranspose2d, QuantizationConfig, calibrating, prepare, set_quantization


def _quantized(layer: nn.Module, x: Tensor, **config: Any) -> Any:
    model = nn.Sequential(layer)
    prepare(model, QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same', **config)))
    with torch.no_grad(), calibrating(model):
        model(x)
    return model[0]


GEOMETRIES = [
    dict(kernel_size=2, stride=2),
    dict(kernel_size=3, stride=2, padding=1, output_padding=1, bias=False),
    dict(kernel_size=3, dilation=2, groups=2),
    dict(kernel_size=2, stride=2, groups=2),
]


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_a_transposed_convolution_has_one_step_per_output_channel(geometry: dict[str, Any]) -> None:
    """Each output channel computed separately, as a transposed convolution with one output channel."""
    x = torch.randn(2, 4, 5, 5)
    layer = _quantized(nn.ConvTranspose2d(4, 6, **geometry), x, w_bits=3, a_bits=4)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape[1])[:, None, None] + 0.1)
    assert layer.weight_quantizer.num_steps == 6
    source = layer.input_quantizer(x)
    width_in, width_out = 4 // layer.groups, 6 // layer.groups
    channels = []
    for channel, step in enumerate(layer.weight_quantizer.step.tolist()):
        group, index = divmod(channel, width_out)
        inputs = slice(group * width_in, (group + 1) * width_in)
        weight = (layer.weight[inputs, index : index + 1] / step).round().clamp(-4, 3) * step
        channels.append(
            F.conv_transpose2d(
                source[:, inputs],
                weight,
                None if layer.bias is None else layer.bias[channel : channel + 1],
                stride=layer.stride,
                padding=layer.padding,
                output_padding=layer.output_padding,
                dilation=layer.dilation,
            )
        )
    torch.testing.assert_close(layer(x), torch.cat(channels, dim=1))


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_a_transposed_convolution_switched_off_is_torchs(geometry: dict[str, Any]) -> None:
    """Also with a given output size."""
    x = torch.randn(2, 4, 5, 5)
    layer = nn.ConvTranspose2d(4, 6, **geometry)
    size = [n + layer.stride[0] - 1 for n in nn.ConvTranspose2d(4, 6, **dict(geometry, output_padding=0))(x).shape[2:]]
    expected, sized = layer(x), layer(x, size)
    quantized = _quantized(layer, x)
    assert type(quantized) is QuantConvTranspose2d
    set_quantization(quantized, False)
    assert torch.equal(quantized(x), expected)
    assert torch.equal(quantized(x, size), sized)


def test_the_first_steps_of_a_transposed_convolution_are_those_of_its_channels() -> None:
    """Channels of unlike scale: a step that follows the input channels would be far off."""
    layer = nn.ConvTranspose2d(3, 4, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None])
    quantized = _quantized(layer, torch.randn(1, 3, 4, 4), w_bits=8)
    widest = quantized.weight.abs().amax((0, 2, 3)) / 127
    assert (quantized.weight_quantizer.step / widest).tolist() == pytest.approx([1.0] * 4, rel=0.1)


def test_a_transposed_convolution_learns_its_steps() -> None:
    """Every channel's step, the input's and the weight get a gradient."""
    x = torch.randn(2, 4, 5, 5)
    layer = _quantized(nn.ConvTranspose2d(4, 6, 3, groups=2), x, w_bits=4, a_bits=4)
    layer(x).square().sum().backward()
    assert (layer.weight_quantizer.log_step.grad != 0).all()
    assert (layer.input_quantizer.log_step.grad != 0).all()
    assert (layer.weight.grad != 0).any()


@pytest.mark.parametrize(
    'layer', [nn.Conv2d(4, 6, 1), nn.Conv1d(4, 6, 1), nn.ConvTranspose2d(4, 6, 1), nn.Linear(4, 6)], ids=repr
)
def test_layers_take_their_input_by_the_name_that_pytorch_gives_it(layer: nn.Module) -> None:
    x = torch.randn({nn.Linear: (2, 4), nn.Conv1d: (2, 4, 5)}.get(type(layer), (2, 4, 5, 5)))
    model = nn.Sequential(layer)
    prepare(model, QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same')))
    with torch.no_grad(), calibrating(model):
        model(x)
    assert torch.equal(layer(input=x), layer(x))
