# SPDX-License-Identifier: Apache-2.0
r"""The language in which configs select modules of a network.

A pattern has one of three forms:

* ``backbone.layer*``: a dotted module name with the wildcards of :mod:`fnmatch`. ``*`` also matches dots.
* ``re:backbone\.layer[34]``: a regular expression that must match the whole module name.
* ``type:Conv2d``: a class name. It selects modules of this class and of its subclasses.

A pattern selects modules. What happens to them is up to the setting. Quantizer settings (``zsq.quantizer.scope``,
``skip`` and ``overrides``) apply to every layer inside a selected module, including the module itself: see
:func:`enclosing_patterns`. Distillation losses read the outputs of the selected modules alone: see
:func:`select_modules`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from mmzsq.errors import UserError

REGEX = 're:'
TYPE = 'type:'


def select_modules(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the names of the modules that at least one pattern selects.

    Modules with ``in_float_model = False``, such as quantizers, are never selected: the float network lacks them.

    Args:
        model: Any network.
        patterns: Patterns of this language.

    Returns:
        Names in the order of ``model.named_modules()``, each once.

    Raises:
        UserError: If a pattern selects no module or is not a valid regular expression.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)))
        >>> select_modules(model, ['type:Conv2d'])
        ['0', '1.1']
        >>> select_modules(model, ['1'])
        ['1']
    """
    modules = {name: module for name, module in model.named_modules() if getattr(module, 'in_float_model', True)}
    selected: set[str] = set()
    for pattern in patterns:
        found = _select(modules, pattern)
        if not found:
            raise UserError(
                f'no module of {type(model).__name__} matches {pattern!r}{nearest_hint(modules, pattern)}. Correct the '
                'name of the module in the config.'
            )
        selected |= found
    return [name for name in modules if name in selected]


def enclosing_patterns(model: nn.Module, patterns: Iterable[str]) -> dict[str, frozenset[str]]:
    """For each module of a network, find the patterns that select it or a module around it.

    Args:
        model: Any network.
        patterns: Patterns of this language. A pattern may select nothing.

    Returns:
        Module name to patterns, in the order of ``model.named_modules()``.

    Raises:
        UserError: If a pattern is not a valid regular expression.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3)))
        >>> enclosing_patterns(model, ['1'])['1.1']
        frozenset({'1'})
    """
    modules = dict(model.named_modules())
    selected = {pattern: _select(modules, pattern) for pattern in patterns}
    return {
        name: frozenset(
            pattern for pattern, found in selected.items() if any(outer in found for outer in enclosing_names(name))
        )
        for name in modules
    }


def enclosing_names(name: str) -> Iterator[str]:
    """Yield the names of a module and of all modules around it, from the inside out.

    Example:
        >>> list(enclosing_names('backbone.conv1'))
        ['backbone.conv1', 'backbone', '']
    """
    while name:
        yield name
        name = name.rpartition('.')[0]
    yield ''


def nearest_hint(modules: Mapping[str, nn.Module], pattern: str) -> str:
    """Return the end of an error message that suggests a name or a class close to a pattern without matches.

    Args:
        modules: Modules that the pattern could have selected, by name.
        pattern: Pattern that selects none of them.

    Returns:
        A clause that begins with a semicolon, or ``''`` if there is nothing to suggest.
    """
    if pattern.startswith(REGEX):
        return ''
    kind, wanted = 'name', pattern
    candidates: Iterable[str] = filter(None, modules)
    if pattern.startswith(TYPE):
        kind, wanted = 'class', pattern.removeprefix(TYPE)
        candidates = {cls.__name__: None for module in modules.values() for cls in type(module).__mro__}
    nearest = difflib.get_close_matches(wanted, list(candidates), n=1, cutoff=0.4)
    return f'; the nearest {kind} is {nearest[0]!r}' if nearest else ''


def _select(modules: Mapping[str, nn.Module], pattern: str) -> set[str]:
    if pattern.startswith(TYPE):
        wanted = pattern.removeprefix(TYPE)
        return {name for name, module in modules.items() if wanted in (cls.__name__ for cls in type(module).__mro__)}
    if pattern.startswith(REGEX):
        try:
            expression = re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise UserError(f'the pattern {pattern!r} is not a valid regular expression: {error}') from None
        return {name for name in modules if expression.fullmatch(name)}
    return {name for name in modules if fnmatchcase(name, pattern)}
