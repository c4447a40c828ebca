# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: allowed values are returned, and others are named with what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mmzsq import argument_checks as checks
from mmzsq.errors import UserError


@pytest.mark.parametrize(
    ('check', 'allowed', 'refused', 'message'),
    [
        (
            lambda value: checks.checked_number('x', value, 0),
            [0, 0.5, 10**30],
            [-1e-9, math.nan, math.inf, True, None, '1', [1]],
            'x must be a number of at least 0, got ',
        ),
        (
            lambda value: checks.checked_number('x', value, 0, 1),
            [0, 0.5, 1],
            [-0.1, 1.1, math.nan, False, '0'],
            'x must be a number in [0, 1], got ',
        ),
        (
            lambda value: checks.checked_integer('x', value, 1),
            [1, 10**30],
            [0, 1.0, True, None, '1'],
            'x must be an integer of at least 1, got ',
        ),
        (
            lambda value: checks.checked_flag('x', value),
            [True, False],
            [0, 1, None, 'no'],
            'x must be True or False, got ',
        ),
        (
            lambda value: checks.checked_range('x', value, 0, 1),
            [(0, 1), (0.5, 0.5)],
            [(1, 0), (0, 2), (0,), (0, 1, 1), (0, math.nan), (0, True), '01', 5, None],
            'x must be two numbers (low, high) with 0 <= low <= high <= 1, got ',
        ),
        (
            lambda value: checks.checked_range('x', value, 1),
            [(1, 5), (2.5, 10**30)],
            [(0, 1), (1, math.inf)],
            'x must be two numbers (low, high) with 1 <= low <= high, got ',
        ),
        (
            lambda value: checks.checked_histogram('x', value),
            [None, [0, 1], [0.5]],
            [[], [0, 0], [-1, 2], [math.inf], [True], '12', 3],
            'x must be a list of weights >= 0, at least one > 0, got ',
        ),
        (
            lambda value: checks.checked_patterns('x', value),
            [None, ['backbone', 're:neck.*']],
            [[], [5], [None], 5, True],
            'x must be a module pattern, a list of module patterns or None, got ',
        ),
    ],
)
def test_allowed_values_are_returned_and_others_are_named(
    check: Callable[[Any], Any], allowed: list[Any], refused: list[Any], message: str
) -> None:
    for value in allowed:
        assert check(value) == value
    for value in refused:
        with pytest.raises(UserError) as raised:
            check(value)
        assert str(raised.value) == f'{message}{value!r}'


def test_a_single_pattern_becomes_a_list() -> None:
    assert checks.checked_patterns('x', 'backbone') == ['backbone']
