# SPDX-License-Identifier: Apache-2.0
"""Bits under a budget: the best choice there is, never more than the budget, and nothing else changed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmzsq.errors import UserError
from mmzsq.quantization import (
    LayerReport,
    QuantizationConfig,
    QuantizationReport,
    equalize,
    prepare,
    quantized_layers,
    quantizers,
    set_quantization,
)
from mmzsq.quantization.allocation import Budget, allocatable, allocate, as_settings, assign_bits, overrides_of, totals
from mmzsq.quantization.config import Bits

SETTINGS: dict[str, Any] = dict(w_bits=4, a_bits=6, overrides={'3': 5})


def small_model(**changes: Any) -> QuantizationReport:
    """Four convolutions; the first and the last have 8 bits, the one before the last 5, by an override."""
    model = nn.Sequential(*(nn.Conv2d(c, d, 3, padding=1) for c, d in ((3, 8), (8, 16), (16, 8), (8, 4), (4, 2))))
    return prepare(model, QuantizationConfig.from_dict({**SETTINGS, **changes}), lambda: model(torch.zeros(1, 3, 8, 8)))


@pytest.mark.parametrize('seed', range(60))
def test_it_is_as_good_as_the_best_of_all_choices(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layers, candidates = draw.integers(1, 6), draw.integers(1, 5)
    # Real numbers of either sign, or few values with many ties, tiny ones.
    sensitivity = [draw.normal(size=(layers, candidates)), draw.integers(0, 4, (layers, candidates)) * 1e-7][seed % 2]
    cost = draw.integers(0, 9, (layers, candidates)) * [1, 10**9][seed % 3 == 0]
    budget = int(draw.integers(cost.min(1).sum(), cost.max(1).sum() + 1))
    rows = np.arange(layers)
    choices = [np.array(choice) for choice in itertools.product(range(candidates), repeat=int(layers))]
    best = min(sensitivity[rows, choice].sum() for choice in choices if cost[rows, choice].sum() <= budget)

    chosen = allocate(torch.from_numpy(sensitivity), cost.tolist(), budget)

    assert cost[rows, chosen].sum() <= budget
    assert sensitivity[rows, chosen].sum() == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_the_layers_of_a_large_detector_are_no_matter_of_patience() -> None:
    draw = np.random.default_rng(0)
    bits = np.arange(2, 9)
    weights = draw.integers(1, 4000, 300) * 576
    sensitivity = np.exp(draw.normal(0, 2, (300, 1))) * 4.0**-bits * np.exp(draw.normal(0, 0.2, (300, 7)))
    chosen = bits[allocate(sensitivity, np.outer(weights, bits), 4 * weights.sum())]
    assert 3.999 * weights.sum() < (chosen * weights).sum() <= 4 * weights.sum()
    assert sensitivity[np.arange(300), chosen - 2].sum() < 0.2 * sensitivity[:, 2].sum()


def test_a_budget_below_the_cheapest_is_refused_with_the_least() -> None:
    with pytest.raises(UserError, match='the budget is 4, but even the cheapest candidates cost 5'):
        allocate([[1, 0], [1, 0]], [[2, 9], [3, 9]], budget=4)
    assert allocate([[1, 0], [1, 0]], [[2, 9], [3, 9]], budget=5) == [0, 0]
    with pytest.raises(UserError, match='not finite'):
        allocate([[1, float('nan')]], [[1, 2]], budget=5)
    with pytest.raises(ValueError, match='both'):
        allocate([[1, 2]], [[1, 2, 3]], budget=5)


def test_layers_with_bits_of_their_own_are_left_out() -> None:
    assert [layer.name for layer in allocatable(small_model())] == ['1', '2']
    assert [layer.name for layer in allocatable(small_model(first_bits='same', skip=['2']))] == ['0', '1']
    with pytest.raises(UserError, match='no layer to allocate bits to'):
        allocatable(small_model(overrides={'*': 5}))


SENSITIVITY = [[3.0, 2.0, 1.0], [9.0, 5.0, 1.0]]
"""Of the two free layers, alike in weights and operations, at 3, 4 and 6 bits."""


def with_bits(*bits: tuple[int, int]) -> QuantizationReport:
    """The model whose two free layers have these bits of weight and input."""
    own = {name: dict(w_bits=of[0], a_bits=of[1]) for name, of in zip('12', bits, strict=True)}
    return small_model(overrides={**SETTINGS['overrides'], **own})


@pytest.mark.parametrize(
    ('spent', 'expected'),
    [((4, 4), (4, 4)), ((3, 6), (3, 6)), ((6, 3), (3, 6)), ((3, 4), (3, 4)), ((6, 6), (6, 6)), ((3, 3), (3, 3))],
)
def test_a_budget_is_what_the_report_counts(spent: tuple[int, int], expected: tuple[int, int]) -> None:
    report = small_model()
    both_bits = [(bits, bits) for bits in expected]
    weight_bits = [(bits, SETTINGS['a_bits']) for bits in expected]

    size = with_bits(*((bits, SETTINGS['a_bits']) for bits in spent)).size_after
    assert Budget.from_size(report, (3, 4, 6), size + 1e-9).allocate(SENSITIVITY) == weight_bits
    assert Budget.from_average_bits(report, (3, 4, 6), sum(spent) / 2).allocate(SENSITIVITY) == weight_bits
    operations = (with_bits(*((bits, bits) for bits in spent)).bops_after or 0) / 1e9
    assert Budget.from_bit_operations(report, (3, 4, 6), operations + 1e-12).allocate(SENSITIVITY) == both_bits


def test_totals_are_those_of_the_model_that_has_the_bits() -> None:
    made = with_bits((3, 6), (6, 2))
    size, operations = totals(small_model(), {'1': Bits(3, 6), '2': Bits(6, 2)})
    assert size == pytest.approx(made.size_after, rel=1e-12)
    assert operations * 1e9 == pytest.approx(made.bops_after, rel=1e-12)


def test_the_most_bits_alike_keep_the_budget() -> None:
    report = small_model()
    assert [Budget.from_average_bits(report, (3, 4, 6), bits).uniform() for bits in (3, 3.9, 4, 5.9, 8)] == [
        3,
        3,
        4,
        4,
        6,
    ]


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_can() -> None:
    report = small_model()
    least = with_bits((3, 6), (3, 6)).size_after
    with pytest.raises(UserError, match='the least possible is .* MB, with 3 bits in each of 2 layers') as error:
        Budget.from_size(report, (3, 4), 0.9 * least).check()
    said = float(str(error.value).split('least possible is ')[1].split(' ')[0])
    assert least <= said < least + 1e-4
    Budget.from_size(report, (3, 4), said).check()
    with pytest.raises(UserError, match=r'budget is 2.5 bits .*least possible is 3.0000 bits'):
        Budget.from_average_bits(report, (3, 4), 2.5).allocate(SENSITIVITY)
    with pytest.raises(UserError, match='a candidate is 9'):
        Budget.from_average_bits(report, (3, 9), 4).check()
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    without_run = prepare(model, QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same')))
    with pytest.raises(UserError, match='bit operations are not known'):
        Budget.from_bit_operations(without_run, (3, 4), 1)


def test_overrides_change_no_layer_that_is_inside_of_another() -> None:
    def layer(name: str, w_bits: int, reason: str = '', kind: str = 'Conv2d') -> LayerReport:
        return LayerReport(name, kind, '', 10, w_bits, w_bits, reason, 1)

    layers = [layer('a', 4), layer('a.offset', 8, 'last layer'), layer('a.skipped', 32, "skip 'a.skipped'")]
    layers += [layer('a.bias', 32, 'a parameter', 'Parameter'), layer('ab', 4), layer('b', 4)]
    overrides = overrides_of(QuantizationReport(nn.Identity(), layers), {'a': Bits(3, 4), 'b': Bits(5, 4)})
    assert list(overrides.items()) == [
        ('a', Bits(3, 4)),
        ('b', Bits(5, 4)),
        ('a.offset', Bits(8, 8)),
        ('a.skipped', None),
    ]
    config = QuantizationConfig(overrides=overrides)
    assert config.bits_of('a', ())[0] == Bits(3, 4)
    assert config.bits_of('a.offset', ())[0] == Bits(8, 8)


@pytest.mark.parametrize('budget', ['size', 'operations'])
def test_the_same_bits_in_each_layer_are_within_what_a_config_asks_for(budget: str) -> None:
    """Just so: the next higher ones are not."""
    report = small_model()
    config = QuantizationConfig.from_dict(dict(SETTINGS, allocate=dict(budget=budget, candidates=[6, 3, 4])))
    found = Budget.from_config(report, config)
    assert found.candidates == [3, 4, 6] and found.inputs == (budget == 'operations')
    spent = found.fixed + found.costs.sum(0)
    wanted = SETTINGS['w_bits'] if budget == 'size' else (SETTINGS['w_bits'] * SETTINGS['a_bits']) ** 0.5
    for bits, cost in zip(found.candidates, spent, strict=True):
        assert (cost <= found.limit * found.scale) == (bits <= wanted)


def test_bits_that_are_assigned_are_those_of_a_model_prepared_with_them() -> None:
    report, made = small_model(), with_bits((3, 6), (8, 2))
    old = dict(report.model.named_modules())['1'].weight_quantizer
    assign_bits(report, QuantizationConfig.from_dict(SETTINGS), {'1': Bits(3, 6), '2': Bits(8, 2)})
    assert report.to_dict() == made.to_dict()
    assert dict(report.model.named_modules())['1'].weight_quantizer is not old
    # The narrow range of 8 bits too.
    assert {name: (q.qmin, q.qmax, q.num_steps) for name, q in quantizers(report.model)} == {
        name: (q.qmin, q.qmax, q.num_steps) for name, q in quantizers(made.model)
    }


def test_inputs_are_divided_in_the_layers_of_a_model_prepared_with_these_bits() -> None:
    """Layers that get 8 bits lose their factors, and those that had 8 get some; float stays."""
    bits = {'1': Bits(8, 8), '2': Bits(4, 8), '3': Bits(4, 4)}
    settings = dict(SETTINGS, equalize=True, overrides={'2': 8})
    overrides = as_settings(bits)
    report, made = small_model(**settings), small_model(**dict(settings, overrides=overrides))
    model: Any = report.model
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-1, 1, 8).view(-1, 1, 1, 1)
    set_quantization(model, False)
    expected = model(x)
    equalize(model, lambda: model(x))
    assert (model[1].input_scale != 1).any()
    assign_bits(report, QuantizationConfig.from_dict(dict(settings, overrides=overrides)), bits)
    assert model.state_dict().keys() == made.model.state_dict().keys()
    set_quantization(model, False)
    torch.testing.assert_close(model(x), expected)
    made.model.load_state_dict(model.state_dict())
    set_quantization(made.model, False)
    torch.testing.assert_close(made.model(x), expected)
    # Divided no more than once, and anew.
    assert all(len(of._forward_pre_hooks) == hasattr(of, 'input_scale') for _, of in quantized_layers(model))
    assert all((model[int(name)].input_scale == 1).all() for name in '23')


@pytest.mark.parametrize(
    ('allocate', 'message'),
    [
        (dict(budget='speed'), "zsq.quantizer.allocate.budget is 'speed', but must be 'size' or 'operations'"),
        (
            dict(candidates=[]),
            r'zsq.quantizer.allocate.candidates is \[\], but must be a list of integers from 2 to 8',
        ),
        (dict(candidates=4), 'zsq.quantizer.allocate.candidates is 4, but must be a list of integers'),
        (dict(candidates=[4, 9]), r'zsq.quantizer.allocate.candidates\[1\] is 9, but must be an integer from 2 to 8'),
        (dict(batches=0), 'zsq.quantizer.allocate.batches is 0, but must be an integer of at least 1'),
        (dict(bits=4), "unknown key 'bits' in zsq.quantizer.allocate"),
        (5, 'zsq.quantizer.allocate is 5, but must be a dict'),
    ],
)
def test_a_mistake_in_the_settings_is_one_message(allocate: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizationConfig.from_dict(dict(allocate=allocate))
