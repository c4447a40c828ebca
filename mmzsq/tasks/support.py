# SPDX-License-Identifier: Apache-2.0
"""Check whether a batched loss supports the components and settings of a detector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def unsupported_components(detector: nn.Module, components: Mapping[str, tuple[type, ...]]) -> Iterator[str]:
    """Yield one message per component whose class is not supported.

    Args:
        detector: Any module.
        components: Allowed classes by dotted name. Subclasses are not allowed, because they may compute something else.
    """
    for name, allowed in components.items():
        component = nested_attribute(detector, name)
        if type(component) not in allowed:
            yield f'its {name} is {type(component).__name__}, not {" or ".join(cls.__name__ for cls in allowed)}'


def unsupported_settings(detector: nn.Module, settings: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Yield one message per setting whose value is not supported.

    Args:
        detector: Any module.
        settings: Allowed values by dotted name.
    """
    for name, allowed in settings.items():
        value = nested_attribute(detector, name)
        if value not in allowed:
            yield f'its {name} is {value!r}, not {" or ".join(map(repr, allowed))}'


def nested_attribute(detector: nn.Module, name: str) -> Any:
    """Return the attribute with a dotted ``name``, or None if it does not exist."""
    value: Any = detector
    for step in name.split('.'):
        value = getattr(value, step, None)
    return value
