# SPDX-License-Identifier: Apache-2.0
"""Load the full-precision teacher from a checkpoint, check it against its config, and compute its digest."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.error import URLError

from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmzsq.checkpoint import state_dict_of
from mmzsq.errors import UserError


def load_teacher(detector: nn.Module, checkpoint: str | None) -> dict[str, Any]:
    """Load the weights of a trained detector. The checkpoint must have every weight in the right shape.

    Args:
        detector: The detector that its config builds.
        checkpoint: A file (.pth or .safetensors) or a URL.

    Returns:
        The ``meta`` of the checkpoint; empty if it has none.

    Raises:
        UserError: If no checkpoint is given, it cannot be read, or it belongs to another detector.
    """
    if not checkpoint:
        raise UserError(
            'zero-shot quantization starts from a trained detector: set load_from in the config, or add '
            '--cfg-options load_from=PATH_OR_URL'
        )
    try:
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(
            f'the teacher checkpoint {checkpoint} cannot be read ({error}). Give the file of a trained detector with '
            '--cfg-options zsq.teacher=PATH_OR_URL'
        ) from error
    state = state_dict_of(loaded)
    own = detector.state_dict()
    mismatched = [
        f'{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(value.shape)} in the model'
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = [name for name in own if name not in state and not name.endswith('num_batches_tracked')]
    if missing or mismatched:
        faults = [
            f'{len(found)} weights {fault} ({"; ".join(found[:3])})'
            for found, fault in ((missing, 'are missing'), (mismatched, 'have another shape'))
            if found
        ]
        raise UserError(
            f'{checkpoint} is not a checkpoint of this detector: {" and ".join(faults)}. Check that '
            'the config and its number of classes, num_classes of every head, match the training of the detector'
        )
    detector.load_state_dict(state, strict=False)
    return dict(loaded.get('meta') or {}) if 'state_dict' in loaded else {}


def digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of ``module``, independent of device and file format."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if name.endswith('num_batches_tracked'):
            continue
        sha.update(f'{name} {tuple(value.shape)} '.encode())
        sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
