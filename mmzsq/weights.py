# SPDX-License-Identifier: Apache-2.0
"""The strict check of weights: a checkpoint has every tensor of a model, in its shape, and no other.

MMEngine loads with ``strict=False``: a layer that the checkpoint lacks keeps its random weights, and the run goes on.
The commands of this package call :func:`fitting_weights` instead, which refuses such a checkpoint. It removes prefixes
of wrappers, such as ``module.`` of data parallelism and of averaged models, if all names have them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmzsq.errors import UserError

CONSTANTS = ('num_batches_tracked', 'relative_position_index', 'attn_mask')
"""Last parts of the names of buffers without weights: a counter, and constants that follow from the config."""

COUNTERS = ('steps', 'n_averaged')
"""Names of the counters of averaged models in MMEngine and PyTorch."""

CONTAINERS = ('state_dict', 'model', 'ema_state_dict')
"""Keys of the weights in a checkpoint, in the order in which they are looked up."""

SHOWN = 3
"""Number of names that a message lists of each kind."""


def is_quantized(loaded: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is one of a quantized student.

    Args:
        loaded: Its content.
    """
    return any('_quantizer.' in name for name in _named_values(loaded)[1])


def fitting_weights(
    own: Mapping[str, Tensor],
    loaded: Mapping[str, Any],
    checkpoint: str,
    remedy: str,
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of a model.

    Of a checkpoint of MMEngine's ``EMAHook``, they are the averaged ones, which it saves as ``state_dict``.

    Args:
        own: The state dict of the model.
        loaded: Content of the checkpoint.
        checkpoint: Its name, for messages.
        remedy: End of the message: what to do.

    Returns:
        A tensor for every name in ``own``, except for :data:`CONSTANTS` that the checkpoint lacks.

    Raises:
        UserError: If a tensor is missing, has another shape or kind of numbers, or is left over. The message lists the
            first ones of each kind.
    """
    container, _ = _named_values(loaded)
    if container == 'ema_state_dict':
        print_log(f'{checkpoint} has only averaged weights (ema_state_dict), which are loaded', logger='current')
    elif container == 'state_dict' and 'ema_state_dict' in loaded:
        print_log(f'{checkpoint}: loading the averaged weights, which EMAHook saves as state_dict', logger='current')
    state = unwrapped_weights(own, loaded)
    if not any(isinstance(value, Tensor) for value in state.values()) and not own.keys() & state.keys():
        keys = ', '.join(map(repr, list(loaded)[:SHOWN])) or 'none'
        raise UserError(f'{checkpoint} contains no weights. Its keys are: {keys}. {remedy}')
    missing = [name for name in own if name not in state and not _is_constant(name)]
    misfits = [f'{name} {fault}' for name in own if name in state and (fault := _fault(state[name], own[name]))]
    left_over = [name for name, value in state.items() if name not in own and isinstance(value, Tensor)]
    faults = [
        f'{len(names)} weights {fault} ({"; ".join(names[:SHOWN])})'
        for names, fault in ((missing, 'are missing'), (misfits, 'do not fit'), (left_over, 'are left over'))
        if names
    ]
    if not faults:
        return {name: state[name] for name in own if name in state}
    raise UserError(
        f'{checkpoint} is not a checkpoint of this detector: {" and ".join(faults)}.{_hint(missing, left_over, own)} '
        f'{remedy}'
    )


def _named_values(loaded: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Return the key of the weights in a checkpoint, None if they are its own keys, and the weights by name."""
    for key in CONTAINERS:
        if isinstance(loaded.get(key), Mapping):
            return key, {str(name): value for name, value in loaded[key].items()}
    return None, loaded


def unwrapped_weights(own: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a checkpoint without bookkeeping, and without prefixes of wrappers.

    Args:
        own: The state dict of the model.
        loaded: Content of the checkpoint.

    Returns:
        Values by name. Prefixes that all names share and no name of the model has are removed.
    """
    values = _named_values(loaded)[1]
    state = {name: value for name, value in values.items() if name in own or name not in COUNTERS}
    while True:
        weights = [name for name, value in state.items() if isinstance(value, Tensor) and not _is_duplicate(name, own)]
        prefixes = {name.partition('.')[0] + '.' for name in weights}
        prefix = next(iter(prefixes), '')
        if len(prefixes) != 1 or prefix[:-1] in state or any(name.startswith(prefix) for name in own):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {
        name: value
        for name, value in state.items()
        if name in own or not (_is_constant(name) or _is_duplicate(name, own))
    }


def _is_constant(name: str) -> bool:
    return name.rpartition('.')[2] in CONSTANTS


def _is_duplicate(name: str, own: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor repeats what the config has, or what the checkpoint has elsewhere."""
    if name.startswith('data_preprocessor.'):
        return name not in own
    # MMDetection 2.x saved averaged weights under the usual names, and the others as buffers of the detector.
    return name.startswith('ema_') and name not in own and name[len('ema_') :] in _flat_names(own)


def _flat_names(own: Mapping[str, Tensor]) -> set[str]:
    return {name.replace('.', '_') for name in own}


def _fault(value: Any, own: Tensor) -> str | None:
    """Return why a value cannot be loaded into a tensor of the model; None if it can."""
    if not isinstance(value, Tensor):
        return f'is a {type(value).__name__} in the checkpoint, not a tensor'
    if value.shape != own.shape:
        return f'is {tuple(value.shape)} in the checkpoint and {tuple(own.shape)} in the model'
    if value.layout != torch.strided or value.is_meta:
        return f'is a tensor without values or of the layout {value.layout} in the checkpoint'
    if value.is_floating_point() != own.is_floating_point() or value.is_complex() or value.is_quantized:
        return f'is {value.dtype} in the checkpoint and {own.dtype} in the model'
    return None


def _hint(missing: list[str], left_over: list[str], own: Mapping[str, Tensor]) -> str:
    """Explain missing weights by those that are left over."""
    parts = list(dict.fromkeys(name.partition('.')[0] for name in left_over))
    if len(parts) > 1 and len(missing) == sum(not _is_constant(name) for name in own):
        return f' The file has the parts {", ".join(parts[:SHOWN])}: if one is the detector, save its weights alone.'
    nearest = difflib.get_close_matches(missing[0], left_over[:2000], n=1) if missing and left_over else []
    return f' The name in the file that is nearest to {missing[0]} is {nearest[0]}.' if nearest else ''
