# SPDX-License-Identifier: Apache-2.0
"""Tensors out of an Ultralytics checkpoint, without importing or running anything that it names.

Such a file is a zip with one record for each storage and a pickle of the whole model object, so it
names classes of packages that are not installed here, and unpickling it freely would run any code
in it. :func:`read_ultralytics` unpickles it with every name that it brings replaced: storages,
tensors and plain containers are made here, classes of known packages become empty shells that only
hold what the pickle puts into them, and any other name is refused.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mmzsq.errors import UserError

DTYPES = {
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}
# Packages whose classes a model of Ultralytics consists of, what its loss names, and what numpy's scalars are made by.
SHELL_PACKAGES = ('models.', 'ultralytics.', 'torch.nn.modules.')
SHELL_NAMES = {
    ('torch', 'device'),
    ('_codecs', 'encode'),
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
}


class Shell:
    """Stands for an object of a class that is not installed: holds its state, does nothing.

    Attributes:
        state: What the pickle set, or None.
    """

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        """Ignore what the class would have been called with."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class UltralyticsCheckpoint:
    """What an Ultralytics checkpoint holds of a model.

    Attributes:
        tensors: Parameters and buffers by Ultralytics' own names, such as ``model.0.conv.weight``.
        classes: Name of each class.
    """

    tensors: dict[str, Tensor]
    classes: tuple[str, ...]


def read_ultralytics(path: Path) -> UltralyticsCheckpoint:
    """Read the model of a checkpoint, its EMA where there is one.

    Args:
        path: A ``.pt`` file as YOLOv5's and Ultralytics' training writes it.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or names anything but tensors,
            plain containers and classes of Ultralytics and torch.nn.
    """
    if not path.is_file():
        raise UserError(f'checkpoint {path} does not exist')
    try:
        with zipfile.ZipFile(path) as archive:
            checkpoint = _Unpickler.open(archive).load()
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(
            f'checkpoint {path} is not the zip file that torch >= 1.6 writes: it is cut off, or '
            'older (load it where it was trained and save it again)'
        ) from error
    except _DAMAGE as error:
        raise UserError(f'checkpoint {path} is damaged: {error!r}') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'checkpoint {path} is no Ultralytics checkpoint: it holds no dict')
    model = checkpoint.get('ema') or checkpoint.get('model')
    if not isinstance(model, Shell) or not isinstance(model.state, dict):
        raise UserError(f'checkpoint {path} is no Ultralytics checkpoint: it has no model object')
    return UltralyticsCheckpoint(dict(_named_tensors(model)), _class_names(model.state))


class _Unpickler(pickle.Unpickler):
    """Builds tensors from the zip's records and shells from everything else.

    Args:
        archive: The open checkpoint.
        record: Name of the pickle in it.
    """

    def __init__(self, archive: zipfile.ZipFile, record: str) -> None:
        super().__init__(archive.open(record))
        self._archive = archive
        self._folder = record.removesuffix('data.pkl')
        self._shells: dict[tuple[str, str], type[Shell]] = {}

    @classmethod
    def open(cls, archive: zipfile.ZipFile) -> _Unpickler:
        """Find the pickle of a checkpoint."""
        records = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        if len(records) != 1:
            raise UserError(f'checkpoint {archive.filename} was not written by torch.save')
        return cls(archive, records[0])

    def find_class(self, module: str, name: str) -> Any:
        """Give what stands for a name; import nothing."""
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ('collections', 'OrderedDict'): OrderedDict,
            ('builtins', 'set'): set,
            ('__builtin__', 'set'): set,
            ('torch', 'Size'): tuple,
            ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
            ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == 'torch' and name in DTYPES:
            return DTYPES[name]
        if module.startswith(SHELL_PACKAGES) or (module, name) in SHELL_NAMES:
            return self._shells.setdefault((module, name), type(name, (Shell,), {}))
        _refuse(self._archive, f'{module}.{name}')

    def persistent_load(self, pid: Any) -> Tensor:
        """Read a storage from its record."""
        kind, dtype, key, _, numel = pid
        if kind != 'storage' or not isinstance(dtype, torch.dtype):
            _refuse(self._archive, f'a persistent object {kind!r}')
        data = bytearray(self._archive.read(f'{self._folder}data/{key}'))
        if len(data) != numel * dtype.itemsize:
            raise EOFError(f'storage {key} has {len(data)} bytes, not {numel * dtype.itemsize}')
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def _refuse(archive: zipfile.ZipFile, name: str) -> NoReturn:
    raise UserError(
        f'checkpoint {archive.filename} names {name}, for which the weights of a detector have no '
        'use: it could run code, and is refused'
    )


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Make what ``torch._utils._rebuild_tensor_v2`` makes; torch checks the bounds."""
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    """Make a plain tensor of what ``torch._utils._rebuild_parameter`` makes a parameter of."""
    return data


def _named_tensors(module: Shell, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Name parameters and buffers as ``nn.Module.state_dict`` does."""
    state = module.state if isinstance(module.state, Mapping) else {}
    for kind in ('_parameters', '_buffers'):
        for name, tensor in state.get(kind, {}).items():
            if isinstance(tensor, Tensor):
                yield f'{prefix}{name}', tensor
    for name, child in state.get('_modules', {}).items():
        if isinstance(child, Shell):
            yield from _named_tensors(child, f'{prefix}{name}.')


def _class_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the class names, a list or a dict by index."""
    names = state.get('names', ())
    if isinstance(names, Mapping):
        names = [names[index] for index in sorted(names)]
    return tuple(str(name) for name in names)
