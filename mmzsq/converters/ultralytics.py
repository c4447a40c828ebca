# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a pickled model without importing or executing anything that the file names.

A checkpoint of Ultralytics is a zip archive with one record per storage and a pickle of the whole model object. The
pickle names classes of packages that are not installed here, and unpickling it without restrictions could run any code.
:func:`read_archive` resolves every name itself: storages, tensors and plain containers are built here, classes of known
packages become empty shells that only hold their state, and all other names are rejected.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from mmzsq.checkpoint import check_archive, describe_error
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
# Packages of the classes in a model of Ultralytics or torchvision, and the functions that its loss and numpy scalars
# need. torchvision's training script stores its arguments.
SHELL_PACKAGES = ('models.', 'ultralytics.', 'torch.nn.modules.', 'torch.nn.parallel.', 'torchvision.')
SHELL_NAMES = {
    ('argparse', 'Namespace'),
    ('torch', 'device'),
    ('_codecs', 'encode'),
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
}


MAX_DEPTH = 100
"""Largest depth of modules within modules."""
MAX_MODULES = 100_000
"""Largest number of modules. A module that occurs twice is counted twice."""
SHOWN_LENGTH = 300
"""Length to which a message shortens text of the file."""


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
class ForeignModel:
    """Tensors of a model of another project, and what a pickled module says beside them.

    Attributes:
        tensors: Parameters and buffers under the model's own names, such as ``model.0.conv.weight``.
        classes: Class names, empty if it has none.
        kind: Name of its class, such as ``'DetectionModel'``; empty for a state dict.
        source: File that Ultralytics built it from, such as ``'yolo11n.yaml'``; empty if it names none.
        epsilons: Epsilons of its batch norms; empty for a state dict.
    """

    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()
    kind: str = ''
    source: str = ''
    epsilons: frozenset[float] = frozenset()


def read_ultralytics(path: Path) -> ForeignModel:
    """Read the model of an Ultralytics checkpoint, or its EMA if there is one.

    Args:
        path: A ``.pt`` file written by the training of YOLOv5 or Ultralytics.

    Raises:
        UserError: If the file is missing, damaged or of another kind, or if it names anything except tensors, plain
            containers and classes of Ultralytics, torchvision and torch.nn.
    """
    checkpoint = read_archive(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f'checkpoint {path} is not an Ultralytics checkpoint: it does not contain a dict')
    ema = checkpoint.get('ema')
    model = checkpoint.get('model') if ema is None else ema
    if not is_model(model):
        raise UserError(f'checkpoint {path} is not an Ultralytics checkpoint: it does not contain a model object')
    return model_of(model, path)


def read_archive(path: Path) -> Any:
    """Read a file of ``torch.save``, with shells in place of the objects of known packages.

    Args:
        path: A zip archive as written by torch >= 1.6.

    Raises:
        UserError: If the file is missing, damaged or of another kind, or if it names anything except tensors, plain
            containers and classes of Ultralytics, torchvision and torch.nn.
    """
    if not path.is_file():
        raise UserError(f'checkpoint {path} does not exist')
    # Any other exception is one of the file, which may contain whatever pickle can write.
    try:
        # Sizes are compared before anything is read: a compressed record may be of any size.
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            return _Unpickler.open(archive).load()
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(
            f'checkpoint {path} is not a zip file as written by torch >= 1.6. It is truncated or older. Load an older '
            'file in its original environment and save it again'
        ) from error
    except Exception as error:
        raise UserError(f'checkpoint {path} is damaged: {shorten(describe_error(error), SHOWN_LENGTH)}') from error


def is_model(value: Any) -> TypeGuard[Shell]:
    """Return whether a value of :func:`read_archive` is a module."""
    return isinstance(value, Shell) and isinstance(value.state, dict) and '_modules' in value.state


def model_of(model: Shell, path: Path) -> ForeignModel:
    """Take the tensors, the class names and the kind out of a module.

    Args:
        model: A module as :func:`read_archive` returns it; a wrapper for several devices is removed.
        path: Its file, for messages.

    Raises:
        UserError: If the module is damaged.
    """
    children = model.state.get('_modules')
    if 'Parallel' in type(model).__name__ and isinstance(children, Mapping) and is_model(children.get('module')):
        model = children['module']
    try:
        modules = list(_modules(model, path))
        architecture = model.state.get('yaml')
        source = architecture.get('yaml_file', '') if isinstance(architecture, Mapping) else ''
        return ForeignModel(
            dict(_named_tensors(modules)),
            _class_names(model.state, path),
            type(model).__name__,
            Path(source).name if isinstance(source, str) else '',
            frozenset(_epsilons(modules)),
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'checkpoint {path} is damaged: {shorten(describe_error(error), SHOWN_LENGTH)}') from error


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
        self._storages: dict[str, Tensor] = {}

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
            _refuse(self._archive, f'a persistent object of the type {type(kind).__name__}, which is no storage')
        record = f'{self._folder}data/{key}'
        size = self._archive.getinfo(record).file_size
        if size != numel * dtype.itemsize:
            raise EOFError(f'storage {key} has {size} bytes, not {numel * dtype.itemsize}')
        if key not in self._storages:
            data = bytearray(self._archive.read(record))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _refuse(archive: zipfile.ZipFile, name: str) -> NoReturn:
    # Fused models of Ultralytics bind another forward.
    hint = '. If it is a fused model, give the file that training wrote' if name.endswith('.getattr') else ''
    raise UserError(
        f'checkpoint {archive.filename} refers to {name}, which the weights of a detector do not need. It could run '
        f'code, so the file is rejected{hint}'
    )


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Build a tensor like ``torch._utils._rebuild_tensor_v2``; torch checks the bounds.

    A tensor that repeats the values of its storage is refused: it may be of any size, and copies of it fill the memory.
    """
    if math.prod(size) > storage.numel():
        raise ValueError(f'a tensor of the size {tuple(size)} has a storage of {storage.numel()} values')
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    """Return a plain tensor where ``torch._utils._rebuild_parameter`` returns a parameter."""
    return data


def _modules(model: Shell, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the prefix and the state of each module, in the order of ``nn.Module.named_modules``."""
    # Modules that are still to be visited, with their ancestors: a module may occur twice, but not in itself.
    stack: list[tuple[str, Shell, tuple[int, ...]]] = [('', model, ())]
    visited = 0
    while stack:
        prefix, module, ancestors = stack.pop()
        visited += 1
        if id(module) in ancestors or len(ancestors) > MAX_DEPTH or visited > MAX_MODULES:
            raise UserError(
                f'checkpoint {path} is damaged: its module {shorten(prefix, SHOWN_LENGTH) or "model"} contains itself, '
                'or too many modules'
            )
        state = module.state if isinstance(module.state, Mapping) else {}
        for kind in ('_parameters', '_buffers', '_modules'):
            if not isinstance(state.get(kind, {}), Mapping):
                raise UserError(
                    f'checkpoint {path} is damaged: {kind} of its module {prefix or "model"} is a '
                    f'{type(state[kind]).__name__}, not a dict'
                )
        yield prefix, state
        children = [(name, child) for name, child in state.get('_modules', {}).items() if isinstance(child, Shell)]
        stack += [(f'{prefix}{name}.', child, (*ancestors, id(module))) for name, child in reversed(children)]


def _named_tensors(modules: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under the names of ``nn.Module.state_dict``."""
    for prefix, state in modules:
        for kind in ('_parameters', '_buffers'):
            for name, tensor in state.get(kind, {}).items():
                if isinstance(tensor, Tensor):
                    yield f'{prefix}{name}', tensor


def _epsilons(modules: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[float]:
    """Yield the epsilons of modules with a running variance."""
    for _, state in modules:
        if 'running_var' in state.get('_buffers', {}) and isinstance(state.get('eps'), int | float):
            yield float(state['eps'])


def _class_names(state: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Read the class names, which are a list or a dict by index."""
    names = state.get('names', ())
    if isinstance(names, Mapping) and all(isinstance(index, int) for index in names):
        names = [names[index] for index in sorted(names)]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | int) for name in names):
        raise UserError(
            f'checkpoint {path} is damaged: its class names (a {type(names).__name__}) are not a list of text'
        )
    return tuple(str(name) for name in names)
