# SPDX-License-Identifier: Apache-2.0
"""Learned factors of input channels: what they compute, how they are found and trained, and which layers get them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzsq.config.compose import _optim_wrapper
from mmzsq.config.presets import PRESETS
from mmzsq.quantization import (
    QuantizationConfig,
    calibrating,
    constant_input_scales,
    equalize,
    prepare,
    quantized_layers,
    set_quantization,
)

SIZES = torch.logspace(-1.3, 1.3, 8)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    'conv2d': (lambda: nn.Conv2d(8, 6, 3, padding=1), (4, 8, 9, 7)),
    'grouped': (lambda: nn.Conv2d(8, 6, 3, groups=2), (4, 8, 9, 7)),
    'depthwise': (lambda: nn.Conv2d(8, 8, 3, groups=8), (4, 8, 9, 7)),
    'conv1d': (lambda: nn.Conv1d(8, 6, 3), (4, 8, 9)),
    'transposed, grouped': (lambda: nn.ConvTranspose2d(8, 6, 2, groups=2), (4, 8, 9, 7)),
    'linear': (lambda: nn.Linear(8, 6), (16, 20, 8)),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    """Channels with deviations from 0.05 to 20."""
    last = len(shape) == 3 and shape[-1] == 8
    return torch.randn(shape) * (SIZES if last else SIZES.view(-1, *(1,) * (len(shape) - 2)))


def initialized(model: nn.Module, x: Tensor, **options: Any) -> Any:
    config = dict(dict(w_bits=4, a_bits=4, first_bits='same', last_bits='same', equalize='learned'), **options)
    model = copy.deepcopy(model)
    prepare(model, QuantizationConfig.from_dict(config), run=lambda: model(x))
    with torch.no_grad():
        equalize(model, lambda: model(x))
        with calibrating(model):
            model(x)
    return model


@pytest.mark.parametrize('name', LAYERS)
def test_in_float_nothing_changes_and_the_weight_stays(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), inputs(shape)
    model = initialized(nn.Sequential(layer), x)
    factors = model[0].log_input_scale.detach().exp()
    assert float(factors.max() / factors.min()) > 4
    assert torch.equal(model[0].weight, layer.weight)
    set_quantization(model, False)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-4)


def _rounded(x: Tensor, step: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Rounding to a grid by plain autograd: straight through inside the range."""
    levels = (x / step).clamp(low - zero_point, high - zero_point)
    return (levels + (levels.round() - levels).detach()) * step


@pytest.mark.parametrize('name', ['conv2d', 'grouped', 'depthwise', 'linear'])
def test_output_and_gradients_are_those_of_a_plain_computation(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), inputs(shape)
    model = initialized(nn.Sequential(layer), x)
    quantized = model[0]
    model(x).square().sum().backward()

    log_scale = quantized.log_input_scale.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    scale = log_scale.exp()
    if name == 'linear':
        divided, multiplied = x / scale, weight * scale
    else:
        groups = layer.groups
        # Output channel o reads the input channels of its group.
        reads = torch.stack([scale.view(groups, -1)[o * groups // len(weight)] for o in range(len(weight))])
        divided, multiplied = x / scale.view(-1, 1, 1), weight * reads[..., None, None]
    source, filters = quantized.input_quantizer, quantized.weight_quantizer
    rounded = _rounded(divided, source.step.detach(), source.zero_point, 0, 15)
    shape_of_steps = (-1, *(1,) * (weight.dim() - 1))
    rounded_weight = _rounded(multiplied, filters.step.detach().view(shape_of_steps), torch.zeros(1), -8, 7)
    if name == 'linear':
        expected = F.linear(rounded, rounded_weight, layer.bias)
    else:
        expected = F.conv2d(rounded, rounded_weight, layer.bias, padding=layer.padding, groups=layer.groups)
    expected.square().sum().backward()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    for found, reference in ((quantized.log_input_scale.grad, log_scale.grad), (quantized.weight.grad, weight.grad)):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def test_a_depthwise_convolution_multiplies_integers_with_one_scale_per_channel() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    x = inputs((2, 8, 9, 7))
    quantized = initialized(nn.Sequential(layer), x)[0]
    scale = quantized.log_input_scale.detach().exp().view(-1, 1, 1)
    source = quantized.input_quantizer
    levels = (x / scale / source.step).round().add(source.zero_point).clamp(0, 15) - source.zero_point
    integers = quantized.weight_quantizer.quantize(quantized.filters())
    # One grid in each channel of the input; products of integers, then one factor for each output channel.
    sums = F.conv2d(levels.double(), integers.double(), groups=8)
    factors = source.step.double() * quantized.weight_quantizer.step.double().view(-1, 1, 1)
    torch.testing.assert_close(quantized(x), (sums * factors).detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('bits', [4, 8])
def test_each_channel_of_a_depthwise_convolution_gets_a_grid_that_fits_it(bits: int) -> None:
    layer, x = nn.Conv2d(8, 8, 3, groups=8), inputs((4, 8, 17, 15))
    expected = layer(x)

    def errors(**options: Any) -> Tensor:
        given = initialized(nn.Sequential(layer), x, w_bits=8, a_bits=bits, **options)(x)
        return (given - expected).square().mean((0, 2, 3)) / expected.var((0, 2, 3))

    # Eight quantizers, each of which sees one channel.
    alone = torch.stack(
        [
            (
                initialized(nn.Sequential(single := _only(layer, c)), x[:, c : c + 1], w_bits=8, a_bits=bits)(
                    x[:, c : c + 1]
                )
                - single(x[:, c : c + 1])
            )
            .square()
            .mean()
            / expected[:, c].var()
            for c in range(8)
        ]
    )
    with_factors, without = errors(equalize='depthwise'), errors(equalize=False)
    assert without[0] > 20 * alone[0]
    assert (with_factors < 3 * alone).all()


def _only(layer: nn.Conv2d, channel: int) -> nn.Conv2d:
    single = nn.Conv2d(1, 1, 3)
    with torch.no_grad():
        single.weight.copy_(layer.weight[channel : channel + 1])
        single.bias.copy_(layer.bias[channel : channel + 1])  # type: ignore[union-attr, index]
    return single


def test_training_finds_better_factors_than_ones() -> None:
    layer, x = nn.Conv2d(8, 8, 3, groups=8), inputs((4, 8, 9, 7))
    model: Any = nn.Sequential(copy.deepcopy(layer))
    prepare(model, QuantizationConfig(w_bits=8, a_bits=4, first_bits='same', last_bits='same'))
    with torch.no_grad(), calibrating(model):
        model(x)
    assert not model[0].log_input_scale.any()
    weights = 1 / layer(x).detach().var((0, 2, 3), keepdim=True)

    def loss() -> Tensor:
        return ((model(x) - layer(x)).square() * weights).mean()

    start = loss().item()
    optimizer = torch.optim.Adam([model[0].log_input_scale], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * start
    # Small channels are made larger.
    assert model[0].log_input_scale[0] < model[0].log_input_scale[-1] - 0.5


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ('options', 'learned'),
    [
        ({}, ['2']),
        (dict(w_bits=4, a_bits=4), ['2']),
        (dict(equalize='learned'), ['0', '2', '4', '6']),
        (dict(equalize=True, w_bits=4), []),
        (dict(equalize=False), []),
        # A grid on the value itself: a second one behind the division would round twice.
        (dict(target='onnxruntime'), []),
        (dict(target='tensorrt'), []),
    ],
)
def test_depthwise_layers_get_factors_by_default(options: dict[str, Any], learned: list[str]) -> None:
    model, image = _network(), torch.rand(1, 3, 16, 16)
    prepare(model, QuantizationConfig.from_dict(options), run=lambda: model(image))
    assert [name for name, layer in quantized_layers(model) if hasattr(layer, 'log_input_scale')] == learned


def test_the_paper_has_no_factors() -> None:
    sections = {name: section.quantizer for name, section in PRESETS.items()}
    assert {name: section.equalize for name, section in sections.items()} == dict(
        default='depthwise', instant='depthwise', reconstruct='depthwise', paper=False, paper_transformer=False
    )


def test_networks_without_depthwise_layers_are_as_without_factors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.rand(2, 3, 8, 8)
    states = [initialized(model, x, equalize=option).state_dict() for option in ('depthwise', False)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_factors_learn_at_the_rate_of_steps_without_decay() -> None:
    model = initialized(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), inputs((2, 8, 9, 7)), equalize='depthwise')
    train = PRESETS['default'].train
    keys = _optim_wrapper(train, train.optimizer.model_dump())['paramwise_cfg']['custom_keys']
    found = {
        name: settings
        for name, _ in model.named_parameters()
        for key, settings in keys.items()
        if key in f'student.{name}'
    }
    assert found['0.log_input_scale'] == found['0.input_quantizer.log_step'] == dict(lr_mult=20.0, decay_mult=0.0)
    assert '0.weight' not in found


def test_a_checkpoint_holds_the_factors_and_a_report_names_them() -> None:
    x = inputs((2, 8, 9, 7))
    layer = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    model = initialized(layer, x, equalize='depthwise')
    loaded = copy.deepcopy(layer)
    config = QuantizationConfig(w_bits=4, a_bits=4, first_bits='same', last_bits='same')
    report = prepare(loaded, config)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))
    row = report.to_dict()['layers'][0]['input']
    assert row['factors_learned'] and row['factors'] == pytest.approx(model[0].log_input_scale.exp().tolist())
    assert f'input factors {min(row["factors"]):.3g}..{max(row["factors"]):.3g}' in report.to_table()
    # 72 + 8 floats; 72 weights of 4 bits, biases, steps of weights, step and zero point, factors.
    assert report.size_before == pytest.approx(80 * 4 / 1e6)
    assert report.size_after == pytest.approx((72 / 2 + (8 + 8 + 2 + 8) * 4) / 1e6)


def test_factors_are_constants_inside_the_block_only() -> None:
    x = inputs((2, 8, 9, 7))
    model = initialized(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), x)
    before, names = model(x), set(model.state_dict())
    with constant_input_scales(model):
        assert torch.equal(model(x), before) and not model[0].input_scale.requires_grad
        assert set(model.state_dict()) == names
    assert not hasattr(model[0], 'input_scale') and torch.equal(model(x), before)


def test_in_bf16_factors_are_not_rounded_to_16_bits() -> None:
    x = inputs((2, 8, 9, 7)).bfloat16()
    model = initialized(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), x.float())
    seen: list[Tensor] = []
    model[0].input_quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast('cpu', torch.bfloat16):
        model(x).float().sum().backward()
    scale = model[0].log_input_scale.exp().view(-1, 1, 1)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], (x.double() / scale.double()).bfloat16())
    assert model[0].log_input_scale.grad.dtype == torch.float32
