# SPDX-License-Identifier: Apache-2.0
"""Integer deployment: integer arithmetic gives the simulated output, and BatchNorm folds exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.quantization import QuantConv2d, QuantizationConfig, calibrating, prepare


def _quantized_conv(images: Tensor, bits: int, padding_mode: str = 'zeros') -> QuantConv2d:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode=padding_mode))
    config = dict(w_bits=bits, a_bits=bits, first_bits='same', last_bits='same')
    config['weight'] = dict(narrow=True)
    prepare(model, QuantizationConfig.from_dict(config))
    with torch.no_grad(), calibrating(model):
        model(images)
    layer = model[0]
    assert isinstance(layer, QuantConv2d)
    return layer


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_output_is_an_integer_convolution(bits: int) -> None:
    """int64 sums of (q_x - z) * q_w, padded with the zero point, times both steps."""
    images = torch.randn(2, 3, 8, 8)
    layer = _quantized_conv(images, bits)
    source, weight = layer.input_quantizer, layer.weight_quantizer
    integers = source.quantize(images).long()
    zero_point = int(source.integer_zero_point)
    assert 0 < zero_point < source.qmax
    padded = F.pad(integers, (1, 1, 1, 1), value=zero_point) - zero_point
    sums = F.conv2d(padded, weight.quantize(layer.weight).long())
    expected = sums * source.step * weight.step.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(images), expected)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('bits', [2, 8])
def test_output_is_an_integer_transposed_convolution(bits: int, groups: int) -> None:
    """The same for weights that are stored with the input channels first."""
    images = torch.randn(2, 4, 5, 5)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups))
    config = dict(w_bits=bits, a_bits=bits, first_bits='same', last_bits='same')
    prepare(model, QuantizationConfig.from_dict(config))
    with torch.no_grad(), calibrating(model):
        model(images)
    layer: Any = model[0]
    source, weight = layer.input_quantizer, layer.weight_quantizer
    filters = weight.quantize(layer.filters())
    assert int(filters.unique().numel()) > 2
    stored = torch.cat([group.transpose(0, 1) for group in filters.chunk(groups)]).long()
    assert stored.shape == layer.weight.shape
    integers = source.quantize(images).long() - int(source.integer_zero_point)
    sums = F.conv_transpose2d(integers.double(), stored.double(), stride=2, padding=1, groups=groups)
    expected = sums.float() * source.step * weight.step.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(images), expected)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_bn_folds_without_changing_an_integer(bits: int) -> None:
    """A step for each channel takes in |gamma| / sigma; a negative gamma flips signs, in range."""
    images = torch.randn(2, 3, 8, 8)
    layer = _quantized_conv(images, bits)
    bn = nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -1.0, 0.3, -2.0, 5.0, -0.01]))
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 3.0)
    gain = bn.weight / (bn.running_var + bn.eps).sqrt()
    integers = layer.weight_quantizer.quantize(layer.weight)
    folded = integers * gain.sign().int().view(-1, 1, 1, 1)
    assert int(folded.min()) >= -(2 ** (bits - 1))
    assert int(folded.max()) <= 2 ** (bits - 1) - 1

    steps = layer.weight_quantizer.step * gain.abs()
    bias = bn.bias + (layer.bias - bn.running_mean) * gain
    weight = folded * steps.view(-1, 1, 1, 1)
    output = F.conv2d(layer.input_quantizer(images), weight, bias, padding=1)
    torch.testing.assert_close(output, bn(layer(images)), rtol=1e-4, atol=1e-4)

    # Quantizing the folded float weight anew gives the same integers.
    anew = torch.round(layer.weight * gain.view(-1, 1, 1, 1) / steps.view(-1, 1, 1, 1))
    assert torch.equal(anew.clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1).int(), folded)


def test_other_padding_pads_quantized_values() -> None:
    """Reflected values are on the grid as well."""
    images = torch.randn(1, 3, 8, 8)
    layer = _quantized_conv(images, 4, padding_mode='reflect')
    padded = F.pad(layer.input_quantizer(images), (1, 1, 1, 1), mode='reflect')
    expected = F.conv2d(padded, layer.weight_quantizer(layer.weight), layer.bias)
    torch.testing.assert_close(layer(images), expected)
