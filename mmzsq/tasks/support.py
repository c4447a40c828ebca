# SPDX-License-Identifier: Apache-2.0
"""Whether a detector is made of exactly the parts, with the settings, that a batched loss computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def unsupported_components(detector: nn.Module, parts: Mapping[str, tuple[type, ...]]) -> Iterator[str]:
    """Say, part by part, what keeps ``detector`` from being made of ``parts``.

    Args:
        detector: Any module.
        parts: The classes that the part of a dotted name may be of; a subclass may compute something else.
    """
    for name, allowed in parts.items():
        part = attribute(detector, name)
        if type(part) not in allowed:
            yield f'its {name} is {type(part).__name__}, not {" or ".join(cls.__name__ for cls in allowed)}'


def unsupported_settings(detector: nn.Module, settings: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    """Say, setting by setting, what of ``detector`` has another value.

    Args:
        detector: Any module.
        settings: The values that the setting of a dotted name may have.
    """
    for name, allowed in settings.items():
        value = attribute(detector, name)
        if value not in allowed:
            yield f'its {name} is {value!r}, not {" or ".join(map(repr, allowed))}'


def attribute(detector: nn.Module, name: str) -> Any:
    """What a dotted ``name`` leads to; None where it leads nowhere."""
    part: Any = detector
    for step in name.split('.'):
        part = getattr(part, step, None)
    return part
