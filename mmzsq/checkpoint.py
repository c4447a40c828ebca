# SPDX-License-Identifier: Apache-2.0
"""Read and write checkpoints (``.pth`` and ``.safetensors``) without executing code from the file.

:func:`register_checkpoint_loaders` replaces MMEngine's loaders with those of this module, so that ``load_from``,
``--resume`` and ``init_cfg`` use them. In addition to files and URLs, they accept ``mmzsq://NAME`` for weights in
``mmzsq/assets``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import digit_version
from safetensors import safe_open
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

HISTORY_STATISTICS = ('min', 'max', 'current', 'mean')

_mmengine_load_from_local = mmengine_checkpoint.load_from_local

PATH_OPTION = '--cfg-options load_from=PATH (zsq.teacher=PATH if the config sets zsq.teacher)'
"""Option that names another checkpoint, for error messages."""


def register_checkpoint_loaders() -> None:
    """Make MMEngine read local files, URLs and ``mmzsq://NAME`` with the loaders of this module."""
    # MMEngine's log names a loader by the part of its function name after 'load_from_'.
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
    CheckpointLoader.register_scheme(SCHEME, load_from_mmzsq, force=True)


def allow_mmengine_checkpoints() -> None:
    """Register the objects in MMEngine's checkpoints as safe to load.

    MMEngine 0.10.7 saves its message hub in every checkpoint. The hub contains ``HistoryBuffer`` objects that wrap
    numpy arrays. Since torch 2.6, ``torch.load`` uses ``weights_only=True`` by default and rejects objects that are not
    registered as safe. The functions registered here only build arrays and numbers. Earlier versions of torch have no
    such register, and this function does nothing there.

    It runs before each load: OneDL's MMEngine removes the same objects from the register after loads of its own.
    """
    if not SAFE_LOADING:
        return
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in np.typecodes['AllInteger'] + 'efd?']
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    # numpy 2 renamed numpy.core to numpy._core. A checkpoint uses the name in the version that wrote it.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed += [(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')]
    # Pickles refer to methods through getattr, which is unsafe in general: allow a restricted version only.
    allowed += [(_history_statistic, 'builtins.getattr')]
    torch.serialization.add_safe_globals(allowed)


def _history_statistic(owner: type, name: str) -> Callable[..., Any]:
    if owner is HistoryBuffer and name in HISTORY_STATISTICS:
        return getattr(HistoryBuffer, name)
    raise UnpicklingError(f'the file refers to the attribute {name!r} of {owner!r}')


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
    # Any exception is one of the file: torch's unpickler raises many kinds, and more of them in every release.
    try:
        check_archive(path)
        loaded = _torch_load(path, map_location)
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(_foreign_objects(path) or _damaged(path, error)) from error
    except Exception as error:
        raise UserError(_damaged(path, error)) from error
    check_structure(loaded, str(path))
    return loaded


def _torch_load(path: Path, map_location: Any) -> Any:
    if not SAFE_LOADING:
        print_log(
            f'torch {torch.__version__} cannot load {path} with weights_only=True. Code that the file may contain is '
            'run: load only files that you trust, or install torch >= 2.6',
            logger='current',
            level=logging.WARNING,
        )
        return _mmengine_load_from_local(str(path), map_location)
    allow_mmengine_checkpoints()
    with warnings.catch_warnings():
        # Of pickle protocols above 2, which the error names.
        warnings.filterwarnings('ignore', message='Detected pickle protocol')
        return torch.load(path, map_location=map_location, weights_only=True)


def check_archive(path: Path) -> None:
    """Compare the sizes and check sums of a file of ``torch.save`` before it is loaded; torch does neither.

    Args:
        path: The file. Files of other formats pass.

    Raises:
        UserError: If the records would be larger than the file, or a record does not match its CRC-32.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        compressed = next((r.filename for r in records if r.compress_type != zipfile.ZIP_STORED), None)
        if compressed is not None:
            raise UserError(
                f'checkpoint {path} was not written by torch.save: its record {compressed} is compressed. Unpack the '
                'archive if it contains a checkpoint'
            )
        size, stored = path.stat().st_size, sum(record.file_size for record in records)
        if stored > size:
            raise UserError(f'checkpoint {path} is damaged: it has {size} bytes, but claims records of {stored} bytes')
        for record in records:
            # 0: written with torch.serialization.set_crc32_options(False).
            if record.CRC:
                with archive.open(record) as content:
                    while content.read(2**22):
                        pass


def check_structure(loaded: Any, checkpoint: str) -> None:
    """Check the types of the parts of a checkpoint that are read by name.

    Args:
        loaded: What the file contains.
        checkpoint: Its path or URL, for the message.

    Raises:
        UserError: If it is not a dict, or one of its parts is not.
    """
    if not isinstance(loaded, Mapping):
        raise UserError(f'{checkpoint} contains a {type(loaded).__name__}, but a checkpoint is a dict of weights')
    if not all(isinstance(name, str) for name in loaded):
        name = next(name for name in loaded if not isinstance(name, str))
        raise UserError(f'{checkpoint} is not a checkpoint: it has the key {name!r}, but keys must be text')
    meta = loaded.get('meta')
    own = meta.get('mmzsq') if isinstance(meta, Mapping) else None
    for key, value in (
        *((key, loaded[key]) for key in ('state_dict', 'ema_state_dict') if key in loaded),
        *((key, value) for key, value in (('meta', meta), ('meta.mmzsq', own)) if value is not None),
    ):
        if not isinstance(value, Mapping):
            raise UserError(
                f'{checkpoint} is not a checkpoint: its {key} is a {type(value).__name__}, but must be a dict'
            )


def read_checkpoint(checkpoint: Any) -> dict[str, Any]:
    """Read a checkpoint to the CPU by the loader for its kind of path.

    Args:
        checkpoint: A file, a URL or ``mmzsq://NAME``.

    Returns:
        The checkpoint. If it has a ``state_dict``, it has a dict ``meta``, whose ``mmzsq``, if any, is a dict too.

    Raises:
        UserError: If it cannot be read, or is not a checkpoint.
    """
    if not isinstance(checkpoint, str | Path) or not str(checkpoint):
        raise UserError(f'the checkpoint is {checkpoint!r}, but must be a path or a URL. Set it with {PATH_OPTION}')
    try:
        loaded = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    except UserError:
        raise
    except Exception as error:
        # Loaders of other schemes raise what their packages raise.
        raise UserError(
            f'the checkpoint {checkpoint} cannot be read ({describe_error(error)}). Set another one with {PATH_OPTION}'
        ) from error
    check_structure(loaded, str(checkpoint))
    meta = {key: value for key, value in (loaded.get('meta') or {}).items() if key != 'mmzsq' or value is not None}
    return dict(loaded, meta=meta) if 'state_dict' in loaded else dict(loaded)


def checkpoint_file(checkpoint: str) -> Path | None:
    """Return the local file of a checkpoint that was loaded, or None if its scheme has none.

    Args:
        checkpoint: A file, an http or https URL, or ``mmzsq://NAME``.
    """
    if checkpoint.startswith(SCHEME):
        return ASSETS / checkpoint.removeprefix(SCHEME)
    if checkpoint.startswith(('http://', 'https://')):
        return _download_path(checkpoint)
    path = Path(checkpoint).expanduser()
    return path if path.is_file() else None


def file_sha256(checkpoint: str) -> str | None:
    """Return the SHA-256 of the bytes of a checkpoint's file, as ``sha256sum`` prints it.

    Args:
        checkpoint: As of :func:`checkpoint_file`.

    Returns:
        64 hexadecimal digits; None if the checkpoint has no local file.
    """
    path = checkpoint_file(checkpoint)
    if path is None:
        return None
    sha = hashlib.sha256()
    with open(path, 'rb') as file:
        while content := file.read(2**22):
            sha.update(content)
    return sha.hexdigest()


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
    except Exception as error:
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
    path = _download_path(filename)
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


def _download_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / 'checkpoints' / os.path.basename(urlparse(url).path)


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


def describe_error(error: BaseException) -> str:
    """Return the text of an exception with its type; the type alone if it has no text."""
    text = str(error).strip()
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _damaged(path: Path, error: Exception) -> str:
    reason = describe_error(error)
    # torch advises to load with weights_only=False, which would run code of the file.
    _, separator, detail = reason.partition('WeightsUnpickler error:')
    if separator:
        reason = detail.strip().split('\n')[0] or type(error).__name__
    if reason == 'Unsupported operand 149':
        return (
            f'checkpoint {path} cannot be read: it was pickled with protocol 4 or 5, which torch cannot load safely. '
            'Save it again with the default protocol of torch.save'
        )
    return f'checkpoint {path} cannot be read. It may be truncated or not a checkpoint: {reason}'


def _foreign_objects(path: Path) -> str | None:
    """Return a message that lists the objects torch refused; None if there are none, or the file is damaged."""
    try:
        found = ', '.join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        # It cannot read files of an older format, nor damaged ones.
        return None
    if not found:
        return None
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
