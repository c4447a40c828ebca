# SPDX-License-Identifier: Apache-2.0
"""Equalization: input channels of different ranges get similar ones, and the weights compensate for it."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvWS2d
from torch import Tensor, nn

from mmzsq.quantization import (
    QuantizationConfig,
    calibrating,
    equalize,
    prepare,
    quantized_layers,
    set_quantization,
)
from mmzsq.quantization.equalize import MAX_SCALE, best_scale, scaled_weight

# Made when this is read, before any test is seeded: the same weights each time.
torch.manual_seed(0)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    'conv2d': (nn.Conv2d(8, 6, 3, padding=1), (4, 8, 9, 7)),
    'grouped': (nn.Conv2d(8, 6, 3, groups=2), (4, 8, 9, 7)),
    'depthwise': (nn.Conv2d(8, 8, 3, groups=8), (4, 8, 9, 7)),
    'conv1d': (nn.Conv1d(8, 6, 3), (4, 8, 9)),
    'transposed': (nn.ConvTranspose2d(8, 6, 2, stride=2), (4, 8, 9, 7)),
    'transposed, grouped': (nn.ConvTranspose2d(8, 6, 2, groups=2), (4, 8, 9, 7)),
    'linear': (nn.Linear(8, 6), (16, 20, 8)),
}


def inputs(shape: tuple[int, ...], linear: bool, unlike: bool = True) -> Tensor:
    """Channels with deviations from 0.05 to 20."""
    sizes = torch.logspace(-1.3, 1.3, 8) if unlike else torch.ones(8)
    return torch.randn(shape) * (sizes if linear else sizes.view(-1, *(1,) * (len(shape) - 2)))


def prepared(layer: nn.Module, **options: object) -> nn.Module:
    config = dict(w_bits=4, a_bits=4, first_bits='same', last_bits='same', **options)
    model = nn.Sequential(copy.deepcopy(layer))
    prepare(model, QuantizationConfig.from_dict(config))
    return model


def initialized(layer: nn.Module, x: Tensor, **options: object) -> nn.Module:
    model = prepared(layer, **options)
    with torch.no_grad():
        equalize(model, lambda: model(x))
        with calibrating(model):
            model(x)
    return model


@pytest.mark.parametrize('name', LAYERS)
def test_nothing_changes_in_float(name: str) -> None:
    layer, shape = LAYERS[name]
    x = inputs(shape, name == 'linear')
    model = initialized(layer, x, equalize=True)
    assert not torch.allclose(model[0].input_scale, torch.ones(8))
    set_quantization(model, False)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [name for name in LAYERS if name != 'depthwise'])
def test_channels_of_different_ranges_lose_less(name: str) -> None:
    layer, shape = LAYERS[name]
    linear = name == 'linear'
    # What carries little is not for that of little weight.
    layer = copy.deepcopy(layer)
    sizes = torch.logspace(-1.3, 1.3, 8)
    with torch.no_grad():
        layer.weight.copy_(scaled_weight(prepared(layer)[0], 1 / sizes))
    seen, x = inputs(shape, linear), inputs(shape, linear)
    errors = [
        (initialized(layer, seen, equalize=option)(x) - layer(x)).square().mean().item() for option in (False, True)
    ]
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize('name', LAYERS)
def test_channels_of_equal_ranges_lose_nothing(name: str) -> None:
    layer, shape = LAYERS[name]
    x = inputs(shape, name == 'linear', unlike=False)
    errors = [(initialized(layer, x, equalize=option)(x) - layer(x)).square().mean().item() for option in (False, True)]
    assert errors[1] < 1.1 * errors[0]


def test_a_silent_channel_gets_a_factor_within_range() -> None:
    layer, shape = LAYERS['conv2d']
    x = inputs(shape, False)
    x[:, 3] = 0
    scale = initialized(layer, x, equalize=True)[0].input_scale
    assert scale.isfinite().all()
    assert scale.min() >= 1 / MAX_SCALE and scale.max() <= MAX_SCALE


def test_no_factor_is_better_than_a_bad_one() -> None:
    model = prepared(nn.Linear(8, 6), equalize=True)
    # All values, and all weights, are on a grid already.
    nn.init.constant_(model[0].weight, 0.5)
    model[0].weight.data[:, ::2] = -0.25
    model[0].weight.data[:, 0] = 1.75
    rows = torch.tensor([0.0, 15.0])[:, None].expand(2, 8) * 1.0
    assert torch.equal(best_scale(model[0], rows), torch.ones(8))


def test_a_checkpoint_holds_the_factors() -> None:
    layer, shape = LAYERS['conv2d']
    x = inputs(shape, False)
    model, loaded = initialized(layer, x, equalize=True), prepared(layer, equalize=True)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_an_initialized_layer_keeps_its_factors() -> None:
    layer, shape = LAYERS['conv2d']
    x = inputs(shape, False)
    model = initialized(layer, x, equalize=True)
    before = copy.deepcopy(model.state_dict())
    equalize(model, lambda: model(10 * x.flip(1)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_quantizers_find_other_factors_and_float_stays() -> None:
    layer, shape = LAYERS['conv2d']
    x = inputs(shape, False)
    model = initialized(layer, x, equalize=True)
    first = model[0].input_scale.clone()
    config = QuantizationConfig(w_bits=2, a_bits=8, equalize=True)
    model[0].add_quantizers(config.weight_quantizer(2, 6), config.input_quantizer(8))
    equalize(model, lambda: model(x * torch.logspace(1, -1, 8).view(-1, 1, 1)))
    assert not torch.allclose(model[0].input_scale, first)
    set_quantization(model, False)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-4)


def test_the_weight_learns_and_the_factor_does_not() -> None:
    layer, shape = LAYERS['conv2d']
    x = inputs(shape, False).requires_grad_()
    model = initialized(layer, x.detach(), equalize=True)
    model(x).square().sum().backward()
    assert model[0].weight.grad.any() and x.grad.any()
    assert 'input_scale' not in dict(model[0].named_parameters())


def test_layers_of_8_bits_and_of_other_classes_have_no_factors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ConvWS2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    config = dict(w_bits=4, a_bits=4, first_bits=8, last_bits='same', equalize=True)
    image = torch.rand(1, 3, 8, 8)
    prepare(model, QuantizationConfig.from_dict(config), run=lambda: model(image))
    assert [name for name, layer in quantized_layers(model) if hasattr(layer, 'input_scale')] == ['2']


def test_factors_count_in_the_size_of_the_quantized_model_only() -> None:
    model, plain = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)) for _ in range(2))
    config = dict(w_bits=4, a_bits=4, first_bits='same', last_bits='same')
    report, without = (
        prepare(m, QuantizationConfig.from_dict(dict(config, equalize=option)))
        for m, option in ((model, True), (plain, False))
    )
    assert report.size_before == without.size_before
    # 3 and 4 input channels, a float each.
    assert report.size_after - without.size_after == pytest.approx(7 * 4 / 1e6)
