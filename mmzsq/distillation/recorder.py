# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of the modules of a network by name, without changes to the model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.patching import patched_forwards


def flatten_tensors(output: Any) -> list[Tensor]:
    """Return all tensors of nested tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in flatten_tensors(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in flatten_tensors(value)]
    return []


def match_modules(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the modules of ``model`` that a pattern selects, in order of registration.

    Args:
        model: Any network.
        patterns: Each a shell pattern of a module's name (``'backbone.*.conv'``), ``'re:'`` and a regular expression
            that must match the whole name, or ``'type:'`` and the name of a class or of one of its bases
            (``'type:Conv2d'``).

    Raises:
        UserError: If nothing matches a pattern.
    """
    names: dict[str, None] = {}
    modules = dict(model.named_modules())
    for pattern in patterns:
        if pattern.startswith('type:'):
            wanted = pattern[len('type:') :]
            found = [n for n, m in modules.items() if wanted in (base.__name__ for base in type(m).__mro__)]
        elif pattern.startswith('re:'):
            found = [name for name in modules if re.fullmatch(pattern[len('re:') :], name)]
        else:
            found = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f'no module of {type(model).__name__} matches {pattern!r}')
        names.update(dict.fromkeys(found))
    return [name for name in modules if name in names]


class Recorder:
    """Records the outputs of named modules. Several recorders may record one module at the same time.

    Args:
        model: The network.
        names: Names of the modules to record.

    Raises:
        UserError: If a name is not a module of ``model``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self.modules = {}
        for name in names:
            if name not in modules:
                raise UserError(f'{type(model).__name__} has no module {name!r} to record')
            self.modules[name] = modules[name]

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Record every forward pass inside the block.

        Yields:
            The tensors that each module returned, flattened, of all its calls in order, by module name.
        """
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        # Not a forward hook: MMDetection's detectors call `bbox_head.forward(...)` directly, which runs no hook.
        forwards = {module: _recording(module.forward, outputs[name]) for name, module in self.modules.items()}
        with patched_forwards(forwards):
            yield outputs


def _recording(forward: Callable[..., Any], outputs: list[Tensor]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs.extend(flatten_tensors(result))
        return result

    return record
