# SPDX-License-Identifier: Apache-2.0
"""State of all global random generators as plain data, which a checkpoint holds.

Augmentation of batches, quantizers with random drops, data loaders and transforms draw from these generators. A resumed
training that restores them draws what the training without the interruption would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy and PyTorch, on the CPU and on the current GPU.

    Returns:
        Tensors, numbers and tuples, which ``torch.load`` reads with ``weights_only=True``.
    """
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return dict(
        python=random.getstate(),
        numpy=(torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached_gaussian),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    )


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of :func:`random_state`.

    Args:
        state: The state. That of the GPU is ignored if this process uses none.
    """
    version, internal, gaussian = state['python']
    random.setstate((version, tuple(internal), gaussian))
    keys, position, has_gauss, cached_gaussian = state['numpy']
    np.random.set_state(('MT19937', keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    # The checkpoint may have been loaded to a GPU.
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state['cuda'].cpu())
