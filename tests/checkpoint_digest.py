# SPDX-License-Identifier: Apache-2.0
"""Digest that tells whether two trainings ended with the same bits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch


def digest_of_tensors(checkpoint: Path | str) -> str:
    """SHA-256 of all tensors of a checkpoint but those of the log: weights, averages, moments and random states."""
    content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    digest = hashlib.sha256()

    def add(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, part in value.items():
                add(part, f'{name}.{key}')
        elif isinstance(value, list | tuple):
            for index, part in enumerate(value):
                add(part, f'{name}.{index}')

    add({key: value for key, value in content.items() if key not in ('meta', 'message_hub')}, '')
    return digest.hexdigest()
