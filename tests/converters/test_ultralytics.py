# SPDX-License-Identifier: Apache-2.0
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.errors import UserError


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    """A model class of a package that exists only while a checkpoint is written."""
    module = types.ModuleType('models.yolo')

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
            self.names = ['cat', 'dog']

    Model.__module__, Model.__qualname__ = 'models.yolo', 'Model'
    module.Model = Model
    monkeypatch.setitem(sys.modules, 'models', types.ModuleType('models'))
    monkeypatch.setitem(sys.modules, 'models.yolo', module)
    return Model


def forget_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('models', 'models.yolo'):
        monkeypatch.setitem(sys.modules, name, None)


def write_pickle(path: Path, data: bytes) -> Path:
    """Write a zip file in torch's checkpoint format with ``data`` as its pickle."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', data)
        archive.writestr('archive/version', '3')
    return path


@pytest.mark.parametrize('half', [False, True])
def test_tensors_and_classes_are_read_without_the_package(
    upstream: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    model = upstream()
    model.model[1].running_mean.normal_()
    if half:
        model.half()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({'epoch': -1, 'model': model, 'ema': None}, tmp_path / 'a.pt')
    forget_upstream(monkeypatch)
    checkpoint = read_ultralytics(tmp_path / 'a.pt')
    assert checkpoint.classes == ('cat', 'dog')
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)


def test_the_averaged_model_is_preferred_and_classes_may_be_a_dict(upstream: type[nn.Module], tmp_path: Path) -> None:
    model, ema = upstream(), upstream()
    ema.names = {1: 'dog', 0: 'cat'}
    torch.save({'model': model, 'ema': ema}, tmp_path / 'a.pt')
    checkpoint = read_ultralytics(tmp_path / 'a.pt')
    assert checkpoint.classes == ('cat', 'dog')
    assert torch.equal(checkpoint.tensors['model.0.weight'], ema.model[0].weight)


class Attack:
    """Creates a file when unpickled freely."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def touch(path: Path) -> None:
    path.touch()


def attacks(mark: Path) -> dict[str, bytes]:
    code = f'open({str(mark)!r}, "w").close()'
    return {
        'eval': pickle.dumps(Attack(eval, code), 2),
        'exec': pickle.dumps({'model': Attack(exec, code)}, 4),
        'system': b'cposix\nsystem\n(Vtouch ' + str(mark).encode() + b'\ntR.',
        'getattr': b'c__builtin__\ngetattr\n(cos\nsystem\nV__call__\ntR.',
        # A dotted name that starts with an allowed one.
        'dotted': b'\x80\x04\x8c\x05torch\x8c\x14hub.load_state_dict_\x93.',
        'instance': b'(Vtouch ' + str(mark).encode() + b'\niposix\nsystem\n.',
    }


@pytest.mark.parametrize('kind', ['eval', 'exec', 'system', 'getattr', 'dotted', 'instance'])
def test_a_malicious_pickle_is_rejected_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / 'mark'
    path = write_pickle(tmp_path / 'evil.pt', attacks(mark)[kind])
    with pytest.raises(UserError, match='could run code, so the file is rejected'):
        read_ultralytics(path)
    assert not mark.exists()


def test_shells_run_no_code_of_the_original_class(tmp_path: Path) -> None:
    # torch.nn is installed, but its modules are not built: Linear would reject these arguments.
    data = b'ctorch.nn.modules.linear\nLinear\n(Vno number\ntR.'
    with pytest.raises(UserError, match='does not contain a dict'):
        read_ultralytics(write_pickle(tmp_path / 'a.pt', data))


def test_damaged_and_foreign_files_are_named(upstream: type[nn.Module], tmp_path: Path) -> None:
    torch.save({'model': upstream(), 'ema': None}, tmp_path / 'a.pt')
    content = (tmp_path / 'a.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match='not a zip file'):
        read_ultralytics(tmp_path / 'cut.pt')
    with pytest.raises(UserError, match='is damaged'):
        read_ultralytics(write_pickle(tmp_path / 'half.pt', pickle.dumps({'a': [1, 2]})[:-4]))
    with pytest.raises(UserError, match='does not contain a model object'):
        read_ultralytics(write_pickle(tmp_path / 'plain.pt', pickle.dumps({'a': 1})))
    with pytest.raises(UserError, match='does not exist'):
        read_ultralytics(tmp_path / 'missing.pt')
    with zipfile.ZipFile(tmp_path / 'other.pt', 'w') as archive:
        archive.writestr('readme', 'hello')
    with pytest.raises(UserError, match=r'not written by torch.save'):
        read_ultralytics(tmp_path / 'other.pt')


@pytest.mark.parametrize(('numel', 'size'), [(100, 2), (2, 100)])
def test_a_tensor_never_reaches_beyond_its_record(numel: int, size: int, tmp_path: Path) -> None:
    data = (
        b'ctorch._utils\n_rebuild_tensor_v2\n'
        b'((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQI0\n(I%d\nt(I1\ntI00\nNtR.' % (numel, size)
    )
    path = write_pickle(tmp_path / 'a.pt', data)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('archive/data/0', bytes(8))
    with pytest.raises(UserError, match='is damaged'):
        read_ultralytics(path)


def cyclic(model: nn.Module) -> None:
    object.__setattr__(model.model[0], '_modules', {'again': model})


def many(model: nn.Module) -> None:
    """Modules within modules, each twice: 2**60 paths."""
    inner = nn.Module()
    for _ in range(60):
        outer = nn.Module()
        outer._modules = {'a': inner, 'b': inner}
        inner = outer
    model._modules = {'model': inner}


def nested_names(model: nn.Module) -> None:
    names: list[object] = ['a']
    for _ in range(60):
        names = [names, names]
    model.names = names


def set_attribute(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda model: object.__setattr__(model, name, value)


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (cyclic, 'contains itself'),
        (many, 'too many modules'),
        (nested_names, 'not a list of text'),
        (set_attribute('names', 5), 'not a list of text'),
        (set_attribute('names', {'a': 'cat', 1: 'dog'}), 'not a list of text'),
        (set_attribute('_modules', [1]), '_modules of its module model is a list'),
        (set_attribute('_parameters', 'text'), '_parameters of its module model is a str'),
        (set_attribute('_buffers', None), '_buffers of its module model is a NoneType'),
        (set_attribute('extra', torch.zeros(1).expand(10**9)), 'storage of 1 values'),
    ],
)
def test_odd_models_are_refused_with_a_reason(
    upstream: type[nn.Module], tmp_path: Path, spoil: Callable[[nn.Module], None], message: str
) -> None:
    model = upstream()
    spoil(model)
    torch.save({'model': model}, tmp_path / 'odd.pt')
    with pytest.raises(UserError, match=rf'odd\.pt is damaged: .*{message}'):
        read_ultralytics(tmp_path / 'odd.pt')


@pytest.mark.parametrize('ema', [0, '', [], {}, 'text', torch.ones(2)])
def test_an_odd_average_is_refused(upstream: type[nn.Module], tmp_path: Path, ema: object) -> None:
    torch.save({'model': upstream(), 'ema': ema}, tmp_path / 'odd.pt')
    with pytest.raises(UserError, match='does not contain a model object'):
        read_ultralytics(tmp_path / 'odd.pt')


def test_a_compressed_storage_is_refused_before_it_is_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / 'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}))
        archive.writestr('archive/data/0', bytes(10**7))
    monkeypatch.setattr(zipfile.ZipFile, 'open', None)
    with pytest.raises(UserError, match='is compressed'):
        read_ultralytics(tmp_path / 'bomb.pt')


def test_any_damage_ends_in_a_message(upstream: type[nn.Module], tmp_path: Path) -> None:
    torch.save({'model': upstream(), 'ema': None}, tmp_path / 'whole.pt')
    content = (tmp_path / 'whole.pt').read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / 'a.pt'
    for index in random.choice(len(content), 200, replace=False):
        damaged = bytearray(content)
        damaged[index] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with suppress(UserError):
            read_ultralytics(path)
    # The pickle alone, with a check sum that fits.
    with zipfile.ZipFile(tmp_path / 'whole.pt') as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith('data.pkl'))
    for index in random.choice(len(data), 300, replace=False):
        damaged = bytearray(data)
        damaged[index] = random.integers(256)
        with suppress(UserError):
            read_ultralytics(write_pickle(path, bytes(damaged)))
