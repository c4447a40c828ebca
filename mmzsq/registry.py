# SPDX-License-Identifier: Apache-2.0
"""Registries of scope ``mmzsq``: children of MMEngine's root registries, and roots for this project's own parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from mmzsq.errors import UserError, check_keys

SCOPE = 'mmzsq'

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope=SCOPE,
    locations=['mmzsq.models', 'mmzsq.qat', 'mmzsq.distillation', 'mmzsq.engine'],
)
MODEL_WRAPPERS = Registry('model wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope=SCOPE, locations=['mmzsq.engine'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope=SCOPE, locations=['mmzsq.datasets'])
DATA_SAMPLERS = Registry('data sampler', parent=MMENGINE_DATA_SAMPLERS, scope=SCOPE, locations=['mmzsq.datasets'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope=SCOPE, locations=['mmzsq.datasets.transforms'])
FUNCTIONS = Registry('function', parent=MMENGINE_FUNCTIONS, scope=SCOPE, locations=['mmzsq.datasets'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmzsq.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope=SCOPE, locations=['mmzsq.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['mmzsq.engine'],
)
TASK_UTILS = Registry('task util', parent=MMENGINE_TASK_UTILS, scope=SCOPE, locations=['mmzsq.models'])
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope=SCOPE, locations=['mmzsq.engine'])

QUANTIZERS = Registry('quantizer', scope=SCOPE, locations=['mmzsq.quantization'])
PRIORS = Registry('prior', scope=SCOPE, locations=['mmzsq.synthesis'])
LABEL_SAMPLERS = Registry('label sampler', scope=SCOPE, locations=['mmzsq.synthesis'])


def resolve_class(registry: Registry, kind: Any) -> Any:
    """Return the class that ``type`` refers to in a config.

    Args:
        registry: Registry to look names up in.
        kind: Registered name, or the class itself, as Python-style configs allow.

    Returns:
        The class, or None if the name is not registered.
    """
    return registry.get(kind) if isinstance(kind, str) else kind


def build_part(registry: Registry, cfg: Any, where: str, base: type = object) -> Any:
    """Build a registered part from its config section.

    Args:
        registry: Registry that contains the class.
        cfg: ``type`` and the arguments of the class.
        where: Name of the section in messages, for example ``'zsq.label_sampler'``.
        base: Class that the part must be derived from, where the registry also holds other classes.

    Raises:
        UserError: If the type is missing or unknown, or if the class does not accept an argument. The message names the
            section.
    """
    if not isinstance(cfg, Mapping):
        raise UserError(f'{where} is {cfg!r}, but must be a dict with a type.')
    arguments = dict(cfg)
    name = arguments.pop('type', None)
    part = resolve_class(registry, name) if name else None
    if not _is_subclass(part, base):
        known = [f'{SCOPE}.{key}' for key, entry in sorted(registry.module_dict.items()) if _is_subclass(entry, base)]
        kind = registry.name if base is object else base.__name__
        raise UserError(f'{where}.type is {name!r}, which is not a registered {kind}. Registered: {", ".join(known)}.')
    parameters = inspect.signature(part).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_keys(arguments, parameters, where)
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments and not _is_variadic(parameter):
            raise UserError(f'{where} lacks {parameter.name}, which {part.__name__} requires.')
    try:
        return part(**arguments)
    except UserError as error:
        # Parts name their class and the argument, and parts within parts their section.
        raise (error if str(error).startswith(where) else UserError(f'{where}: {error}')) from error.__cause__


def _is_subclass(part: Any, base: type) -> TypeGuard[type]:
    # Registries also hold functions.
    return inspect.isclass(part) and issubclass(part, base)


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
