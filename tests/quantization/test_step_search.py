# SPDX-License-Identifier: Apache-2.0
"""Initial steps compared with brute force over a fine grid of candidates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmzsq.quantization import step_search
from mmzsq.quantization.step_search import mean_abs_step, search_step


def _mse(x: Tensor, step: float, zero_point: int, qmin: int, qmax: int) -> float:
    codes = (torch.round(x / step) + zero_point).clamp(qmin, qmax) - zero_point
    return float(((codes * step - x) ** 2).mean())


def _search(x: Tensor, qmin: int, qmax: int, zero_points: list[int]) -> tuple[float, int]:
    grid = search_step(x[None], x.min()[None], x.max()[None], qmin, qmax, zero_points)
    return float(grid.step), int(grid.zero_point)


DISTRIBUTIONS = {
    'silu': lambda: F.silu(torch.randn(4000) * 2),
    'relu': lambda: torch.randn(4000).relu(),
    'normal': lambda: torch.randn(4000),
    'heavy tail': lambda: torch.randn(4000) / torch.rand(4000).sqrt(),
    'negative': lambda: -torch.rand(4000) - 0.5,
}


@pytest.mark.parametrize('name', DISTRIBUTIONS)
@pytest.mark.parametrize('bits', [2, 4])
def test_offset_search_is_as_good_as_brute_force(name: str, bits: int) -> None:
    """All zero points times 400 steps of an independent search find nothing better by over 1 %."""
    x = DISTRIBUTIONS[name]()
    qmax = 2**bits - 1
    step, zero_point = _search(x, 0, qmax, list(range(qmax + 1)))
    widest = float(x.abs().max())
    brute = min(
        _mse(x, s, z, 0, qmax) for z in range(qmax + 1) for s in torch.linspace(widest / 400, widest, 400).tolist()
    )
    assert _mse(x, step, zero_point, 0, qmax) <= brute * 1.01


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_signed_search_is_as_good_as_brute_force(bits: int) -> None:
    """For each of several rows at once, of different scale."""
    rows = torch.randn(6, 300) * torch.logspace(-3, 3, 6)[:, None]
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grid = search_step(rows, rows.amin(1), rows.amax(1), qmin, qmax, [0])
    assert (grid.zero_point == 0).all()
    for row, step in zip(rows, grid.step.tolist(), strict=True):
        widest = float(row.abs().max()) / qmax
        candidates = torch.linspace(widest / 600, widest, 600).tolist()
        brute = min(_mse(row, s, 0, qmin, qmax) for s in candidates)
        assert _mse(row, step, 0, qmin, qmax) <= brute * 1.02


@pytest.mark.parametrize(('qmin', 'qmax', 'zero_points'), [(-8, 7, [0]), (0, 15, list(range(16))), (-127, 127, [0])])
def test_few_and_many_values_give_the_same_result(
    qmin: int, qmax: int, zero_points: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rounding each value and by looking up each level; rows and values past one block."""
    monkeypatch.setattr(step_search, 'BLOCK', 1000)
    rows = torch.randn(7, 400) * torch.logspace(-3, 3, 7)[:, None]
    grids = []
    for cost in (0, 10**9):
        monkeypatch.setattr(step_search, 'LOOKUP_COST', cost)
        grids.append(search_step(rows, rows.amin(1), rows.amax(1), qmin, qmax, zero_points))
    errors = [
        [_mse(row, float(s), int(z), qmin, qmax) for row, s, z in zip(rows, *grid, strict=True)] for grid in grids
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_eight_bit_offset_search_spans_the_range() -> None:
    """Many zero points are searched in two passes; the result is near the min-max grid's error."""
    x = F.silu(torch.randn(20000) * 2)
    step, zero_point = _search(x, 0, 255, list(range(256)))
    low, high = float(x.min()), float(x.max())
    minmax = (high - low) / 255
    assert _mse(x, step, zero_point, 0, 255) <= _mse(x, minmax, round(-low / minmax), 0, 255)


def test_silu_spends_a_level_on_negatives_only_where_it_pays() -> None:
    """At four bits: no level if the positive values reach far, one if they do not."""
    wide = torch.cat([torch.rand(9000) * 30, torch.full((1000,), -0.278)])
    narrow = torch.cat([torch.rand(3000) * 3, torch.full((7000,), -0.278)])
    assert _search(wide, 0, 15, list(range(16)))[1] == 0
    assert _search(narrow, 0, 15, list(range(16)))[1] >= 1


def test_values_on_a_grid_are_found_exactly() -> None:
    """Integers times a step have no error, and the search comes close to none."""
    x = torch.arange(-3, 13).repeat(50) * 0.25
    step, zero_point = _search(x, 0, 15, list(range(16)))
    assert zero_point == 3
    assert step == pytest.approx(0.25, rel=0.01)


def test_dead_rows_take_the_mean_step_of_the_others() -> None:
    """A step is never zero, and a dead channel can wake up."""
    rows = torch.randn(3, 100)
    rows[1] = 0
    grid = search_step(rows, rows.amin(1), rows.amax(1), -8, 7, [0])
    assert float(grid.step[1]) == pytest.approx(float(grid.step[[0, 2]].mean()))
    nothing = torch.zeros(2, 10)
    grid = search_step(nothing, nothing.amin(1), nothing.amax(1), 0, 15, list(range(16)))
    assert grid.step.tolist() == [1.0, 1.0]


def test_mean_abs_step_is_the_papers() -> None:
    """2 * mean|x| / sqrt(qmax)."""
    assert mean_abs_step(torch.tensor([0.5, 0.0]), 4).tolist() == [0.5, 0.5]
