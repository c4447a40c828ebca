# SPDX-License-Identifier: Apache-2.0
"""Units, learned rounding, and reconstruction of a unit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvWS2d
from torch import Tensor, nn

from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare, quantized_layers, set_quantization
from mmzsq.quantization.adaptive_rounding import AdaptiveRounding
from mmzsq.quantization.quantizers import LSQ
from mmzsq.quantization.reconstruction import Call, Reconstruction, recording_calls
from mmzsq.quantization.units import find_units


class Residual(nn.Module):
    """Two convolutions with a shortcut, which change their input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True) + self.conv2(F.relu(self.conv1(x)))


class SharedHead(nn.Module):
    """A stem, two blocks, and a head that two levels share, beside layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten())
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.blocks(self.stem(x))
        return [self.head.forward(level(x)) for level in self.levels]


def quantized(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Any]:
    """Return a quantized copy of a model, and its float original."""
    model = copy.deepcopy(model).eval()
    config = dict(dict(w_bits=3, a_bits=4, first_bits='same', last_bits='same', equalize=False), **options)
    prepare(model, QuantizationConfig.from_dict(config), run=lambda: model(x))
    with torch.no_grad():
        equalize(model, lambda: model(x))
        with calibrating(model):
            model(x)
    original = copy.deepcopy(model)
    set_quantization(original, False)
    return model, original


def record(model: Any, original: Any, name: str, images: list[Tensor]) -> list[Call]:
    calls = []
    with torch.no_grad():
        for image in images:
            with recording_calls(model.get_submodule(name), original.get_submodule(name)) as recorded:
                original(image.clone()), model(image.clone())
            calls += recorded
    return calls


def test_units_are_the_largest_modules_that_make_all_calls_of_their_layers(monkeypatch: Any) -> None:
    x = torch.rand(1, 3, 8, 8)
    model, _ = quantized(SharedHead(), x)
    monkeypatch.setattr('mmzsq.quantization.units.MAX_LAYERS', 3)
    # The container of both blocks has four layers. The head is called directly, and once for each level.
    assert find_units(model, lambda: model(x)) == ['stem', 'blocks.0', 'blocks.1', 'levels.0', 'head', 'levels.1']
    monkeypatch.setattr('mmzsq.quantization.units.MAX_LAYERS', 1)
    assert find_units(model, lambda: model(x))[1:3] == ['blocks.0.conv1', 'blocks.0.conv2']


def test_a_layer_that_modules_share_is_a_unit() -> None:
    conv = nn.Conv2d(3, 3, 1)
    x = torch.rand(1, 3, 8, 8)
    branches = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3))])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = branches

        def forward(self, x: Tensor) -> list[Tensor]:
            return [branch(x) for branch in self.branches]

    model, original = quantized(Model(), x)
    assert find_units(model, lambda: model(x)) == ['branches.0.0']
    assert len(record(model, original, 'branches.0.0', [x])) == 2


def test_calls_hold_inputs_of_the_quantized_network_and_float_outputs() -> None:
    images = [torch.rand(1, 3, 8, 8) for _ in range(3)]
    float_model = SharedHead().eval()
    model, original = quantized(float_model, torch.cat(images))
    first, *_ = record(model, original, 'blocks.1', images)
    # Before the block changes it in place.
    expected = float_model.blocks[0](float_model.stem(images[0]))
    torch.testing.assert_close(first.targets[0], float_model.blocks[1](expected.clone()))
    torch.testing.assert_close(first.args[0][0], model.blocks[0](model.stem(images[0])))
    assert (first.args[0][0] - expected).abs().max() > 1e-3
    calls = record(model, original, 'head', images)
    assert len(calls) == 6 and not torch.equal(calls[0].targets[0], calls[1].targets[0])


def test_rounding_starts_as_the_weight_and_ends_at_its_neighbors() -> None:
    weight = torch.randn(4, 3, 3, 3)
    quantizer = LSQ(bits=4, num_steps=4)
    quantizer.set_grid(quantizer.initial_weight_grid(weight))
    rounding = AdaptiveRounding(quantizer, weight)
    step = quantizer.step.view(4, 1, 1, 1)
    inside = weight.clamp(quantizer.qmin * step, quantizer.qmax * step)
    torch.testing.assert_close(rounding(weight), inside)
    # Undisturbed, each value goes to its nearest level.
    torch.testing.assert_close(rounding.rounded(), quantizer(weight).detach())
    with torch.no_grad():
        rounding.variable.copy_(torch.randn_like(weight) * 9)
    levels = rounding.rounded() / step
    torch.testing.assert_close(levels, levels.round())
    assert ((levels - inside / step).abs() < 1 + 1e-5).all()
    assert (levels.round().int() == quantizer.quantize(rounding.rounded())).all()


@pytest.mark.parametrize(('level', 'penalty'), [(-9.0, 0.0), (9.0, 0.0), (0.0, 1.0)])
def test_penalty_is_zero_at_levels_and_one_between(level: float, penalty: float) -> None:
    quantizer = LSQ(bits=4)
    quantizer.set_grid(quantizer.initial_weight_grid(torch.randn(2, 3)))
    rounding = AdaptiveRounding(quantizer, torch.randn(2, 3))
    with torch.no_grad():
        rounding.variable.fill_(level)
    assert rounding.penalty(2.0).item() == pytest.approx(penalty)


@pytest.mark.parametrize('equalization', [False, True, 'learned'])
def test_reconstruction_lowers_the_error_on_other_images(equalization: Any) -> None:
    torch.manual_seed(0)
    images = [torch.rand(4, 3, 8, 8) for _ in range(12)]
    model, original = quantized(SharedHead(), torch.cat(images), equalize=equalization)
    unit = model.get_submodule('blocks.0')
    calls = record(model, original, 'blocks.0', images)
    floors = {
        layer: (layer.filters() / layer.weight_quantizer.step.view(-1, 1, 1, 1)).floor() for layer in (unit.conv1,)
    }
    learned = Reconstruction(unit, calls[:8], set(), torch.Generator().manual_seed(0))
    held_out = copy.copy(learned)
    held_out.calls = calls[8:]
    before = held_out.error()
    errors = learned.run(150)
    assert errors.after < 0.8 * errors.before
    assert held_out.error() < 0.9 * before
    # What is stored is what the export reads: no weight is farther than one level from where it was.
    for layer, floor in floors.items():
        moved = layer.weight_quantizer.quantize(layer.filters()) - floor
        inside = (floor >= layer.weight_quantizer.qmin) & (floor < layer.weight_quantizer.qmax)
        assert set(moved[inside].int().unique().tolist()) == {0, 1}


def test_a_reconstruction_that_fails_leaves_the_unit_as_it_was(monkeypatch: Any) -> None:
    monkeypatch.setattr('mmzsq.quantization.reconstruction.ROUNDING_LR', 1e3)
    monkeypatch.setattr('mmzsq.quantization.reconstruction.STEP_LR', 1e3)
    x = torch.rand(2, 3, 8, 8)
    model, original = quantized(SharedHead(), x)
    before = copy.deepcopy(model.state_dict())
    calls = record(model, original, 'blocks.0', [x])
    errors = Reconstruction(model.blocks[0], calls, set(), torch.Generator().manual_seed(0)).run(2)
    assert errors.after == errors.before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_standardized_weights_keep_their_rounding_and_learn_steps() -> None:
    x = torch.rand(4, 3, 8, 8)
    model, original = quantized(nn.Sequential(ConvWS2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)), x)
    weight, step = model[0].weight.clone(), model[2].input_quantizer.step.clone()
    calls = record(model, original, '0', [x])
    Reconstruction(model[0], calls, set(), torch.Generator().manual_seed(0)).run(20)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(model[0].input_quantizer.step, step)


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 9)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 9, 9)),
        (nn.Linear(4, 6), (5, 4)),
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    ],
)
@pytest.mark.parametrize('equalization', [False, True, 'learned'])
def test_filters_are_stored_as_they_are_read(layer: nn.Module, shape: tuple[int, ...], equalization: Any) -> None:
    model, _ = quantized(nn.Sequential(layer), torch.randn(shape), equalize=equalization)
    ((_, found),) = quantized_layers(model)
    filters = torch.randn_like(found.filters())
    found.set_filters(filters)
    torch.testing.assert_close(found.filters(), filters)


def test_a_quantizer_of_another_unit_is_not_learned_again() -> None:
    x = torch.rand(2, 3, 8, 8)
    model, original = quantized(SharedHead(), x)
    unit = model.blocks[0]
    fixed = {unit.conv1.input_quantizer}
    before = unit.conv1.input_quantizer.step.clone(), unit.conv2.input_quantizer.step.clone()
    Reconstruction(unit, record(model, original, 'blocks.0', [x]), fixed, torch.Generator().manual_seed(0)).run(20)
    assert torch.equal(unit.conv1.input_quantizer.step, before[0])
    assert not torch.equal(unit.conv2.input_quantizer.step, before[1])
