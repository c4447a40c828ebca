# SPDX-License-Identifier: Apache-2.0
"""Write the classes and functions that a pure-Python config names as strings.

In a pure-Python config of MMEngine (``with read_base(): ...``), ``type`` is a class or a function. MMEngine's own
conversion into text, ``module.Name``, cannot be read again where a function shadows the module
(``mmdet.models.losses.iou_loss``), and MMCV finds its own operators only by their bare names (``nms``). The strings
here mean the same object again. A config of strings can be written to a file, read, compared and hashed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import mmengine.registry
from mmcv import ops
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS, OPTIMIZERS, WEIGHT_INITIALIZERS, Registry
from mmengine.utils import get_object_from_string

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS, PRIORS, QUANTIZERS

ROOTS = (
    *(value for value in vars(mmengine.registry).values() if isinstance(value, Registry)),
    *(QUANTIZERS, PRIORS, LABEL_SAMPLERS),
)
"""The registries that those of all projects descend from, and those of this package."""

UNSCOPED = (MODELS, WEIGHT_INITIALIZERS, OPTIMIZERS)
"""MMCV and MMEngine compare some names in these, such as ``'Sigmoid'`` and ``'Pretrained'``, without a scope."""


def with_plain_types(cfg: Config) -> Config:
    """Return a copy of a config in which each ``type`` is a string.

    The names that a pure-Python config imports, its functions and its modules are left out, as MMEngine leaves them out
    of the file that it writes. Configs with text only come back unchanged.

    Args:
        cfg: A config of either style.

    Raises:
        UserError: If a class or function cannot be imported, or is defined where it cannot be imported from.
    """
    kept = {
        key: value
        for key, value in cfg._to_lazy_dict().items()
        if not isinstance(value, (types.FunctionType, types.ModuleType))
    }
    made = Config(
        _plain(kept, ''), cfg_text=cfg.text, env_variables=cfg.env_variables, format_python_code=cfg._format_python_code
    )
    # The constructor would read the file, which may be gone.
    object.__setattr__(made, '_filename', cfg.filename)
    return made


def plain_section(section: ConfigDict) -> dict[str, Any]:
    """Return a section of a config as a dict in which each ``type`` is a string.

    Args:
        section: For example ``cfg.model``.

    Raises:
        UserError: See :func:`with_plain_types`.
    """
    plain: dict[str, Any] = _plain(section._to_lazy_dict(), '')
    return plain


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner, f'{where}.{key}'.lstrip('.')) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner, f'{where}[{index}]') for index, inner in enumerate(value))
    # Values under other keys may have to be the class itself.
    return type_name(value, where) if where.endswith(('.type', '_type')) or where == 'type' else value


def type_name(kind: Any, where: str = 'type') -> Any:
    """Return a name by which MMEngine finds a class or function.

    Args:
        kind: A class, a function, or one of MMEngine's lazy objects. Everything else is returned as it is.
        where: Key in the config, for messages.

    Returns:
        In this order: its name in a registry (``'mmdet.RTMDet'``, ``'SiLU'``); the bare name of an operator of MMCV
        (``'nms'``); its place (``'package.module.Name'``). What no name finds is returned as it is.

    Raises:
        UserError: If a lazy object cannot be imported.
    """
    if isinstance(kind, (LazyObject, LazyAttr)):
        try:
            found = kind.build()
        except Exception as error:
            raise UserError(f'{where} of the config cannot be imported: {type(error).__name__}: {error}') from error
    else:
        found = kind
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        # A module, for example: MMEngine says what is wrong with it.
        return kind
    return next(_names(found), kind)


def _names(kind: Any) -> Iterator[str]:
    yield from _registered_names(kind)
    name = getattr(kind, '__name__', '')
    # MMCV evaluates such names within its own module.
    if getattr(ops, name, None) is kind:
        yield name
    parts = kind.__module__.split('.') if isinstance(kind.__module__, str) else []
    for end in range(len(parts), 0, -1):
        place = '.'.join((*parts[:end], kind.__qualname__))
        if get_object_from_string(place) is kind:
            yield place


def _registered_names(kind: Any) -> Iterator[str]:
    for root in ROOTS:
        for registry in _descendants(root):
            for name, entry in registry.module_dict.items():
                if entry is not kind:
                    continue
                shadowed = any(child.module_dict.get(name, kind) is not kind for child in root.children.values())
                yield name if registry in UNSCOPED and not shadowed else f'{registry.scope}.{name}'


def _descendants(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _descendants(child)


def stable_text(value: Any) -> str:
    """Describe a value that JSON cannot hold, without its address in memory.

    Args:
        value: For example a class in a config. For ``json.dumps(..., default=stable_text)``.
    """
    if isinstance(value, (LazyObject, LazyAttr)):
        return f'{value.module}.{value}'
    if inspect.isclass(value) or inspect.isroutine(value):
        return f'{value.__module__}.{value.__qualname__}'
    return str(value)
