# SPDX-License-Identifier: Apache-2.0
"""Write the weights of a detector to one file, with the names of its classes.

The counterpart of :mod:`mmzsq.checkpoint`, which reads both formats.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.synthesis.atomic_files import make_directory, write_atomically

SUFFIXES = ('.safetensors', '.pth', '.pt')


def check_suffix(path: Path) -> None:
    """Refuse a file name whose ending names no format that :func:`save_weights` writes.

    Raises:
        UserError: With the endings that are allowed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path} must end in one of {", ".join(SUFFIXES)}')


def save_weights(state_dict: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Write weights and class names; the file appears whole or not at all.

    Args:
        state_dict: Tensors by name.
        classes: Name of each class, in the order of the detector's labels.
        path: Ends in ``.safetensors``, or in ``.pth`` or ``.pt`` for what ``torch.save`` writes.

    Raises:
        UserError: If ``path`` ends otherwise, or cannot be written.
    """
    check_suffix(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    dataset_meta = {'classes': list(classes)}
    if path.suffix == '.safetensors':
        content = save(tensors, {'dataset_meta': json.dumps(dataset_meta)})
    else:
        file = io.BytesIO()
        torch.save({'state_dict': tensors, 'meta': {'dataset_meta': dataset_meta}}, file)
        content = file.getvalue()
    make_directory(path.parent)
    write_atomically(path, content)
