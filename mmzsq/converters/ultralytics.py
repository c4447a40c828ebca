# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of an Ultralytics checkpoint without importing or executing anything that it names.

Such a file is a zip archive with one record per storage and a pickle of the whole model object. The pickle names
classes of packages that are not installed here, and unpickling it without restrictions could run any code.
:func:`read_ultralytics` resolves every name itself: storages, tensors and plain containers are built here, classes of
known packages become empty shells that only hold their state, and all other names are rejected.
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
# Packages of the classes in an Ultralytics model, and the functions that its loss and numpy scalars need.
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
    """Placeholder for an object whose class is not installed. It holds the state and has no behavior.

    Attributes:
        state: State from the pickle, or None.
    """

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        """Ignore the arguments for the original class."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class UltralyticsCheckpoint:
    """Tensors and class names of a model in an Ultralytics checkpoint.

    Attributes:
        tensors: Parameters and buffers under Ultralytics' names, such as ``model.0.conv.weight``.
        classes: Class names.
    """

    tensors: dict[str, Tensor]
    classes: tuple[str, ...]


def read_ultralytics(path: Path) -> UltralyticsCheckpoint:
    """Read the model of a checkpoint, or its EMA if there is one.

    Args:
        path: A ``.pt`` file written by the training of YOLOv5 or Ultralytics.

    Raises:
        UserError: If the file is missing, damaged or of another kind, or if it names anything except tensors, plain
            containers and classes of Ultralytics and torch.nn.
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
            f'checkpoint {path} is not a zip file as written by torch >= 1.6. It is truncated or older. Load an older '
            'file in its original environment and save it again'
        ) from error
    except _DAMAGE as error:
        raise UserError(f'checkpoint {path} is damaged: {error!r}') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'checkpoint {path} is not an Ultralytics checkpoint: it does not contain a dict')
    model = checkpoint.get('ema') or checkpoint.get('model')
    if not isinstance(model, Shell) or not isinstance(model.state, dict):
        raise UserError(f'checkpoint {path} is not an Ultralytics checkpoint: it does not contain a model object')
    return UltralyticsCheckpoint(dict(_named_tensors(model)), _class_names(model.state))


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds tensors from the records of a zip archive and shells for all other objects.

    Args:
        archive: The open checkpoint.
        record: Name of the pickle in the archive.
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
        """Return the replacement of a name without importing anything."""
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
        f'checkpoint {archive.filename} refers to {name}, which the weights of a detector do not need. It could run '
        'code, so the file is rejected'
    )


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Build a tensor like ``torch._utils._rebuild_tensor_v2``; torch checks the bounds."""
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    """Return a plain tensor where ``torch._utils._rebuild_parameter`` returns a parameter."""
    return data


def _named_tensors(module: Shell, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under the names of ``nn.Module.state_dict``."""
    state = module.state if isinstance(module.state, Mapping) else {}
    for kind in ('_parameters', '_buffers'):
        for name, tensor in state.get(kind, {}).items():
            if isinstance(tensor, Tensor):
                yield f'{prefix}{name}', tensor
    for name, child in state.get('_modules', {}).items():
        if isinstance(child, Shell):
            yield from _named_tensors(child, f'{prefix}{name}.')


def _class_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the class names, which are a list or a dict by index."""
    names = state.get('names', ())
    if isinstance(names, Mapping):
        names = [names[index] for index in sorted(names)]
    return tuple(str(name) for name in names)
