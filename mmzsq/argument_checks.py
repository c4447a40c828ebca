# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of registered parts: label samplers, priors and distillation losses.

A config passes arbitrary values to these classes. Each function returns the value, or raises a
:class:`~mmzsq.errors.UserError` with the argument, the value and the allowed values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmzsq.errors import UserError


def checked_number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return ``value`` if it is a finite number in ``[low, high]``.

    Args:
        name: Name of the argument in the message.
        value: Value to check.
        low: Smallest allowed value.
        high: Largest allowed value. By default, there is no limit.

    Raises:
        UserError: If it is not.

    Example:
        >>> checked_number('FeatureMSELoss: loss_weight', -1, 0)
        Traceback (most recent call last):
        mmzsq.errors.UserError: FeatureMSELoss: loss_weight must be a number of at least 0, got -1
    """
    if not _is_number(value) or not low <= value <= high or math.isinf(value):
        raise UserError(f'{name} must be a number {_interval(low, high)}, got {value!r}')
    return value


def checked_integer(name: str, value: int, low: int) -> int:
    """Return ``value`` if it is an integer of at least ``low``.

    Args:
        name: Name of the argument in the message.
        value: Value to check.
        low: Smallest allowed value.

    Raises:
        UserError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f'{name} must be an integer of at least {low}, got {value!r}')
    return value


def checked_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        UserError: If it is not.
    """
    if not isinstance(value, bool):
        raise UserError(f'{name} must be True or False, got {value!r}')
    return value


def checked_patterns(name: str, value: Sequence[str] | str | None) -> list[str] | None:
    """Return module patterns (:mod:`mmzsq.module_patterns`) as a list; None stays None.

    Args:
        name: Name of the argument in the message.
        value: One pattern, a list of at least one, or None.

    Raises:
        UserError: If it is none of these.
    """
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(item, str) for item in patterns):
        raise UserError(f'{name} must be a module pattern, a list of module patterns or None, got {value!r}')
    return list(patterns)


def checked_range(name: str, value: Sequence[float], low: float, high: float = math.inf) -> tuple[float, float]:
    """Return ``value`` as a pair of finite numbers with ``low <= first <= second <= high``.

    Args:
        name: Name of the argument in the message.
        value: Value to check.
        low: Smallest allowed first number.
        high: Largest allowed second number. By default, there is no limit.

    Raises:
        UserError: If it is not.
    """
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(_is_number(bound) for bound in value)
        or not low <= value[0] <= value[1] <= high
        or math.isinf(value[1])
    ):
        limit = '' if math.isinf(high) else f' <= {high}'
        raise UserError(f'{name} must be two numbers (low, high) with {low} <= low <= high{limit}, got {value!r}')
    return value[0], value[1]


def checked_histogram(name: str, value: Sequence[float] | None) -> list[float] | None:
    """Return ``value`` as a list if it is a sequence of finite weights >= 0, at least one of them > 0; None stays None.

    Raises:
        UserError: If it is neither.
    """
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or not all(_is_number(weight) and 0 <= weight < math.inf for weight in value)
        or not any(weight > 0 for weight in value)
    ):
        raise UserError(f'{name} must be a list of weights >= 0, at least one > 0, got {value!r}')
    return list(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _interval(low: float, high: float) -> str:
    return f'of at least {low}' if math.isinf(high) else f'in [{low}, {high}]'
