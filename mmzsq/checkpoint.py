# SPDX-License-Identifier: Apache-2.0
"""Read and write checkpoints (``.pth`` and ``.safetensors``) without executing code from the file.

:func:`register_checkpoint_loaders` replaces MMEngine's loaders with those of this module, so that ``load_from``,
``--resume`` and ``init_cfg`` use them. In addition to files and URLs, they accept ``mmzsq://NAME`` for weights in
``mmzsq/assets``.
"""

from __future__ import annotations

import io
import json
import os
import socket
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.errors import UserError

ASSETS = Path(__file__).parent / 'assets'
SCHEME = 'mmzsq://'

#: Timeout in seconds for a server that does not respond. Without it, a firewall that drops packets blocks for minutes.
TIMEOUT = 20.0

#: Whether torch can load MMEngine's checkpoints with ``weights_only=True``; true since torch 2.6.
SAFE_LOADING: bool = digit_version(torch.__version__) >= digit_version('2.6')

_mmengine_load_from_local = mmengine_checkpoint.load_from_local

PATH_OPTION = '--cfg-options load_from=PATH (zsq.teacher=PATH if the config sets zsq.teacher)'
"""Option that names another checkpoint, for error messages."""


def register_checkpoint_loaders() -> None:
    """Make MMEngine read local files, URLs and ``mmzsq://NAME`` with the loaders of this module."""
    # MMEngine's log names a loader by the part of its function name after 'load_from_'.
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
    CheckpointLoader.register_scheme(SCHEME, load_from_mmzsq, force=True)


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint file.

    Args:
        filename: Path of a ``.safetensors`` file or of a file written by ``torch.save``.
        map_location: Target device of the tensors, as in ``torch.load``.

    Returns:
        The checkpoint. A ``.safetensors`` file is returned as ``{'state_dict': ..., 'meta': ...}``.

    Raises:
        UserError: If the file is missing or damaged, or contains objects other than plain data.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise UserError(
            f'checkpoint {filename} does not exist. Set the path with {PATH_OPTION}, or check the path on the command '
            'line.'
        )
    if path.suffix == '.safetensors':
        return load_safetensors(path, map_location)
    if not SAFE_LOADING:
        return _mmengine_load_from_local(str(path), map_location)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise UserError(_foreign_objects(path)) from error
        raise UserError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(_damaged(path, error)) from error


def read_checkpoint(checkpoint: str) -> Any:
    """Read a checkpoint to the CPU by the loader for its kind of path.

    Args:
        checkpoint: A file, a URL or ``mmzsq://NAME``.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(f'the checkpoint {checkpoint} cannot be read ({error})') from error


def state_dict_of(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a loaded checkpoint by name, without the prefix of a wrapper for distributed training."""
    state = loaded.get('state_dict', loaded)
    return {name.removeprefix('module.'): value for name, value in state.items() if isinstance(value, Tensor)}


def load_safetensors(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Read a ``.safetensors`` file in the form of an MMEngine checkpoint.

    Args:
        path: The file. Its metadata values are JSON; ``dataset_meta`` contains the class names.
        map_location: Device or name of a device. Any other value loads to the CPU.

    Returns:
        ``{'state_dict': {name: tensor}, 'meta': {key: value}}``.

    Raises:
        UserError: If the file is damaged.
    """
    device = str(map_location) if isinstance(map_location, str | torch.device) else 'cpu'
    try:
        with safe_open(path, framework='pt', device=device) as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(_damaged(path, error)) from error
    return {'state_dict': state_dict, 'meta': {k: _json_or_text(v) for k, v in metadata.items()}}


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Download a checkpoint to torch's cache, once per node, and read it.

    Args:
        filename: An http or https URL.
        map_location: As in :func:`load_from_local`.

    Returns:
        The checkpoint.

    Raises:
        UserError: If the file cannot be downloaded or read.
    """
    path = Path(torch.hub.get_dir()) / 'checkpoints' / os.path.basename(urlparse(filename).path)
    if get_local_rank() == 0 and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _socket_timeout():
                torch.hub.download_url_to_file(filename, str(path))
        except (OSError, HTTPException) as error:
            raise UserError(
                f'cannot download {filename} ({error}). Download it by other means and set its path with '
                f'{PATH_OPTION}, or copy it to {path}.'
            ) from error
    barrier()
    return load_from_local(str(path), map_location)


def load_from_mmzsq(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read weights that the package ships.

    Args:
        filename: ``'mmzsq://NAME'``.
        map_location: As in :func:`load_from_local`.

    Returns:
        The checkpoint.

    Raises:
        UserError: If the package ships no such file. The message lists the files that it ships.
    """
    path = ASSETS / filename.removeprefix(SCHEME)
    if path.parent != ASSETS or not path.is_file():
        shipped = sorted(file.name for file in ASSETS.glob('*.safetensors'))
        raise UserError(f'mmzsq ships no weights {path.name!r}. It ships: {", ".join(shipped)}')
    return load_from_local(str(path), map_location)


@contextmanager
def _socket_timeout() -> Iterator[None]:
    """Set the timeout of new sockets to :data:`TIMEOUT` inside the block, because torch.hub has no such option."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _damaged(path: Path, error: Exception) -> str:
    return f'checkpoint {path} cannot be read. It may be truncated or not a checkpoint: {error}'


def _foreign_objects(path: Path) -> str:
    found = ', '.join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return (
        f'checkpoint {path} contains objects that could run code when loaded: {found}. Only tensors '
        'and plain data are loaded. Convert an Ultralytics file with tools/model_converters/'
        "ultralytics_to_mmzsq.py. For any other file, save only its 'state_dict'."
    )


SUFFIXES = ('.safetensors', '.pth', '.pt')


def check_suffix(path: Path) -> None:
    """Reject a file name whose suffix is not a format of :func:`save_weights`.

    Raises:
        UserError: If the suffix is not allowed. The message lists the allowed suffixes.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path} must end in one of {", ".join(SUFFIXES)}')


def save_weights(state_dict: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Write weights and class names atomically.

    Args:
        state_dict: Tensors by name.
        classes: Class names in the order of the detector's labels.
        path: Target file. The suffix selects the format: ``.safetensors``, or ``.pth`` and ``.pt`` for ``torch.save``.

    Raises:
        UserError: If the suffix is not allowed or the file cannot be written.
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
