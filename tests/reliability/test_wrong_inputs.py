# SPDX-License-Identifier: Apache-2.0
"""Every wrong input ends with exit code 2 and one message that names key or file and says what to do.

The tools run in this process, up to the point where work would begin: an input that gets there was accepted wrongly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from wrong_cases import REPO, TINY, Wrong
from wrong_inputs import WRONG_INPUTS

from mmzsq import cli, export, generate, predict, test, train
from mmzsq.engine import QuantizerInitHook
from mmzsq.engine.hooks import CalibrationSetHook
from mmzsq.synthesis import ProceduralGenerator

SCRIPTS = {
    'convert': 'model_converters/ultralytics_to_mmzsq.py',
    'export_safetensors': 'model_converters/export_safetensors.py',
    'voc_to_coco': 'dataset_converters/voc_to_coco.py',
}


class Started(BaseException):
    """Work has begun. No handler of the product catches it."""


def start(*args: Any, **kwargs: Any) -> None:
    raise Started


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / 'tools' / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def tools() -> dict[str, Callable[[], None]]:
    """``main`` of each tool by name."""
    modules: dict[str, Any] = dict(train=train, test=test, generate=generate, predict=predict, export=export)
    modules.update({name: script(path) for name, path in SCRIPTS.items()})
    return {name: module.main for name, module in modules.items()}


def plain_text(cfg: Config) -> str:
    # Without layout: yapf takes a second for each file.
    return ''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items())


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Path:
    """Folder of a finished run of the tiny config."""
    folder = tmp_path_factory.mktemp('finished')
    (folder / 'tiny.py').write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Config, 'pretty_text', property(plain_text))
        patch.setattr(sys, 'argv', ['train', 'tiny.py'])
        tools['train']()
    return folder / 'out'


@pytest.fixture
def folder(
    case: Wrong, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A user's folder with the files of a row, also the current one, in which no tool gets beyond its checks."""
    if case.needs == 'run':
        shutil.copytree(request.getfixturevalue('finished_run'), tmp_path / 'out')
    for name, text in {'tiny.py': TINY, **case.files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if case.prepare is not None:
        case.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID', 'OMPI_COMM_WORLD_LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Config, 'pretty_text', property(plain_text))
    monkeypatch.setattr(CalibrationSetHook, '_synthesize', start)
    monkeypatch.setattr(ProceduralGenerator, 'generate', start)
    monkeypatch.setattr(QuantizerInitHook, 'before_train', start)
    # Loggers of earlier tests write to streams and files that are closed.
    monkeypatch.setattr(MMLogger, '_instance_dict', OrderedDict())
    yield tmp_path
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()


def content(folder: Path) -> dict[str, str]:
    """Return a digest of each file and link below ``folder`` by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def is_log(name: str) -> bool:
    """Return whether a file is one that MMEngine writes when it builds a runner: log, or a copy of the config."""
    return bool(re.match(r'(out|new|work_dirs/\w+)/(\d{8}_\d{6}/|\w+\.py$)', name)) or 'import_cache' in name


def outcome(tool: Callable[[], None], argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """Run a tool. Returns ``'ended'`` with the exit code, ``'accepted'``, or ``'traceback'`` with the exception."""
    monkeypatch.setattr(sys, 'argv', list(argv))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            cli.run(tool)
        except Started:
            return 'accepted', None
        except SystemExit as ended:
            return 'ended', ended.code
        except Exception as error:
            return 'traceback', error
    return 'accepted', None


def message_of(stderr: str) -> str:
    """Return the one message on standard error, without the usage that argparse puts before it, and without log."""
    lines = [line for line in stderr.splitlines() if re.match(r'(\w+: )?error: (?!OpenCV|\()', line)]
    return '\n'.join(lines)


def is_named(name: str, message: str) -> bool:
    """Return whether a message has a name, or a key's section and the key apart, as in `unknown key 'x' in zsq.y`."""
    section, _, key = name.rpartition('.')
    return name in message or (section != '' and section in message and re.search(rf'\b{key}\b', message) is not None)


def judge(case: Wrong, kind: str, value: Any, stderr: str, lost: list[str]) -> tuple[str, str]:
    """Return a verdict and its reason."""
    if kind == 'traceback':
        return 'traceback', f'{type(value).__name__}: {value}'
    if kind == 'accepted':
        return 'accepted', ''
    message = message_of(stderr)
    if value != 2:
        return 'unclear', f'exit code {value!r}'
    if 'Traceback' in stderr:
        return 'traceback', stderr
    if lost:
        return 'lost', ', '.join(lost)
    if len(message.splitlines()) != 1:
        return 'unclear', f'{len(message.splitlines())} messages: {stderr}'
    if not is_named(case.names, message):
        return 'unclear', f'does not name {case.names}: {message}'
    if not re.search(case.remedy, message):
        return 'unclear', f'no remedy: {message}'
    return 'clear', message


@pytest.mark.parametrize(
    'case',
    [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xfail(strict=True, reason=case.fails)] if case.fails else [],
        )
        for case in WRONG_INPUTS
    ],
)
def test_a_wrong_input_gets_one_message_and_loses_nothing(
    case: Wrong,
    folder: Path,
    tools: dict[str, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    before = content(folder)
    kind, value = outcome(tools[case.argv[0]], case.argv, monkeypatch)
    after = content(folder)
    stderr = capfd.readouterr().err
    lost = [f'{name} changed' for name in before if after.get(name) != before[name] and not is_log(name)]
    lost += [f'{name} written' for name in after.keys() - before.keys() if not is_log(name)]
    verdict, reason = judge(case, kind, value, stderr, lost)
    record_property('verdict', verdict)
    record_property('reason', reason)
    assert verdict == 'clear', reason


def test_the_table_has_at_least_250_different_rows() -> None:
    assert len(WRONG_INPUTS) >= 250
    assert len({case.name for case in WRONG_INPUTS}) == len(WRONG_INPUTS)
    assert len({(case.argv, str(case.files), case.prepare) for case in WRONG_INPUTS}) == len(WRONG_INPUTS)
