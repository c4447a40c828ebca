# SPDX-License-Identifier: Apache-2.0
"""MMCV's special convolutions compute the same as in float, on quantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    MaskedConv2d,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    modulated_deform_conv2d,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.quantization import (
    QuantizationConfig,
    calibrating,
    prepare,
    quantized_layers,
    set_quantization,
    step_parameters,
)


def _quantized(layer: nn.Module, x: Tensor, **config: Any) -> Any:
    model = nn.Sequential(layer)
    prepare(model, QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same', **config)))
    with torch.no_grad(), calibrating(model):
        model(x)
    return model[0]


class Moved(nn.Module):
    """A deformable convolution and the offsets and masks that it is given."""

    def __init__(self, layer: nn.Module, taps: int, modulated: bool) -> None:
        super().__init__()
        self.layer = layer
        self.taps = taps
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        where = [torch.randn(len(x), 2 * self.taps, *x.shape[2:])]
        if self.modulated:
            where.append(torch.rand(len(x), self.taps, *x.shape[2:]))
        return self.layer(x, *where)


def other_convolutions() -> dict[str, tuple[nn.Module, Tensor]]:
    """By name: a model of one layer, or of one and what it owns, that computes its convolution in its own way."""
    x = torch.randn(2, 4, 6, 6)
    return {
        'Conv2dAdaptivePadding': (Conv2dAdaptivePadding(4, 6, (2, 3), stride=(2, 1), dilation=(1, 2)), x[:, :, :5]),
        'ConvWS2d': (ConvWS2d(4, 6, 3, padding=1, groups=2), x),
        'ConvAWS2d': (ConvAWS2d(4, 6, 3, stride=2), x),
        'DeformConv2d': (Moved(DeformConv2d(4, 6, 3, padding=1, deform_groups=2), 18, False), x),
        'DeformConv2d of a map smaller than its kernel': (
            Moved(DeformConv2d(4, 6, 3, padding=1), 9, False),
            x[..., :2],
        ),
        'DeformConv2dPack': (DeformConv2dPack(4, 6, 3, padding=1), x),
        'ModulatedDeformConv2d': (Moved(ModulatedDeformConv2d(4, 6, 3, padding=1), 9, True), x),
        'ModulatedDeformConv2dPack': (ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2), x),
        'MaskedConv2d': (MaskedConv2d(4, 6, 3, padding=1), x),
        'Conv1d': (nn.Conv1d(4, 6, 3), x[:, :, 0]),
    }


@pytest.mark.parametrize('name', other_convolutions())
def test_special_convolutions_compute_the_same_on_rounded_operands(name: str) -> None:
    """Switched off it is the float layer, bit by bit; switched on, that layer with the rounded operands."""
    model, x = other_convolutions()[name]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = model(x)
    prepare(model := nn.Sequential(model), QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same')))
    [layer] = [part for _, part in quantized_layers(model) if type(part).__name__ != 'QuantConv2d']
    with torch.no_grad(), calibrating(model):
        model(x)
    set_quantization(model, False)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    set_quantization(model, True)
    quantized = model(x)
    assert not torch.allclose(quantized, expected)
    quantized.sum().backward()
    assert all(part.weight.grad.abs().sum() > 0 for _, part in quantized_layers(model))
    assert all(step.grad is not None and torch.isfinite(step.grad).all() for _, step in step_parameters(model))
    assert layer.weight_quantizer.num_steps == 6


def test_a_standardized_weight_is_quantized_as_it_is_applied() -> None:
    """The integers are those of the standardized weight, whatever the scale of the learned one."""
    x = torch.randn(1, 4, 5, 5)
    layers = []
    for scale in (1.0, 100.0):
        torch.manual_seed(1)
        layer = ConvWS2d(4, 6, 3)
        with torch.no_grad():
            layer.weight.mul_(scale)
        layers.append(_quantized(layer, x, w_bits=3))
    steps = [layer.weight_quantizer.step for layer in layers]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=0)
    with torch.no_grad():
        weight = layers[0].filters()
        torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(6), rtol=0, atol=1e-6)
        torch.testing.assert_close(weight.flatten(1).std(1), torch.ones(6), rtol=1e-3, atol=0)
        rounded = (weight / steps[0][:, None, None, None]).round().clamp(-4, 3) * steps[0][:, None, None, None]
        expected = F.conv2d(layers[0].input_quantizer(x), rounded, layers[0].bias)
        torch.testing.assert_close(layers[0](x), expected)


def test_a_deformable_convolution_interpolates_between_quantized_inputs() -> None:
    layer = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        layer.conv_offset.weight.normal_(std=0.2)
        offsets = layer.conv_offset(x)
    quantized = _quantized(layer, x, w_bits=3, a_bits=3)
    set_quantization(quantized.conv_offset, False)
    with torch.no_grad():
        expected = modulated_deform_conv2d(
            quantized.input_quantizer(x),
            offsets[:, :18],
            offsets[:, 18:].sigmoid(),
            quantized.weight_quantizer(quantized.weight),
            quantized.bias,
            1,
            1,
        )
        torch.testing.assert_close(quantized(x), expected)
