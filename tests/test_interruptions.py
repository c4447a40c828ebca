# SPDX-License-Identifier: Apache-2.0
"""A full disk, a signal or a dead process ends a tool with one message that says what is kept and how to continue."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmzsq import cli, train
from mmzsq.atomic_files import disk_errors
from mmzsq.errors import NotEvaluatedError, UserError

CONFIG = "model = dict(type='YOLOX')\nrunner_type = 'Acting'\nzsq = dict(calibration_set=dict(dir='out/set'))\n"


class Acting:
    """A runner whose training does what a test says."""

    act: Callable[[], Any]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @classmethod
    def from_cfg(cls, cfg: Config) -> Acting:
        """Build as MMEngine builds runners."""
        return cls(cfg)

    def train(self) -> None:
        """Act."""
        Acting.act()


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Signals that a background process ignores have their default effect, also in child processes."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGCHLD: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Train in a way, and return the exit code and what was written to standard error."""
    RUNNERS.register_module(name='Acting', module=Acting)
    (tmp_path / 'my.py').write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, 'LOCAL_RANK', '0')

    def end(act: Callable[[], Any], *args: str) -> tuple[int, str]:
        monkeypatch.setattr(Acting, 'act', staticmethod(act), raising=False)
        monkeypatch.setattr(sys, 'argv', ['tools/train.py', 'my.py', '--work-dir', 'out', *args])
        monkeypatch.setattr(sys.modules['__main__'], '__spec__', None)
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        return int(ended.value.code or 0), capsys.readouterr().err

    yield end
    RUNNERS.module_dict.pop('Acting')


def fail(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


def leave(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith('.pth'):
            ZipFile(name, 'w').close()
        else:
            Path(name).write_text('')


@pytest.mark.parametrize(
    ('number', 'path', 'named', 'remedy'),
    [
        (errno.ENOSPC, 'out/log.txt', 'out/log.txt', 'free disk space'),
        # Errors while a file is written do not name it.
        (errno.ENOSPC, None, 'a file in out', 'free disk space'),
        (errno.EDQUOT, None, 'a file in out', 'free disk space'),
        (errno.EFBIG, None, 'a file in out', 'free disk space'),
        (errno.EROFS, 'out/epoch_2.pth', 'out/epoch_2.pth', 'grant write access or choose another folder'),
        (errno.EACCES, 'out/x', 'out/x', 'grant write access or choose another folder'),
        (errno.ENOTDIR, 'out/x/y', 'out/x/y', 'rename the file or folder that is in its place'),
        (errno.ENOENT, 'nowhere/x', 'nowhere/x', 'check that the path exists'),
    ],
)
def test_an_error_of_the_disk_names_path_cause_what_is_kept_and_the_remedy(
    end: Any, number: int, path: str | None, named: str, remedy: str
) -> None:
    leave('out/epoch_1.pth', 'out/set/manifest.json')
    # The newest file is one that the full disk cut off.
    Path('out/epoch_2.pth').write_bytes(Path('out/epoch_1.pth').read_bytes()[:-4])
    error = OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))
    code, message = end(fail(error))
    assert code == 2
    assert message == (
        f'error: cannot read or write {named}: {os.strerror(number)}. Kept: the calibration set in out/set, the '
        f'checkpoint out/epoch_1.pth. To continue, {remedy}'
        f'{message.partition(remedy)[2].partition(", and run")[0]}, and run '
        '`python tools/train.py my.py --work-dir out --resume`\n'
    )


def test_a_work_dir_that_is_a_file_is_named_before_anything_is_built(end: Any) -> None:
    Path('out').write_text('')
    for name in ('out', 'out/sub'):
        code, message = end(lambda: pytest.fail('started'), '--work-dir', name)
        assert code == 2
        assert f'cannot write {name}: ' in message and 'rename the file or folder that is in its place' in message
        assert message.count('\n') == 1


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_with_one_line_that_says_what_is_kept_and_the_command(end: Any, number: int, code: int) -> None:
    before = signal.getsignal(number)
    leave('out/set/shards/settings.json', 'out/set/shards/00000.json', 'out/set/shards/00001.json')
    assert end(lambda: signal.raise_signal(number)) == (
        code,
        f'stopped by {signal.Signals(number).name}. Kept: 2 finished shards of the calibration set in out/set. To '
        'continue, run `python tools/train.py my.py --work-dir out`\n',
    )
    signal.signal(number, before)


def test_an_interrupted_formatter_of_configs_is_not_taken_for_a_defect(end: Any) -> None:
    # MMEngine formats a config when it saves a checkpoint.
    def act() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise SyntaxError('Failed to format the config file') from None

    before = signal.getsignal(signal.SIGINT)
    leave('out/iter_10.pth')
    code, message = end(act, '--resume')
    assert code == 130
    assert message.endswith(
        'Kept: the checkpoint out/iter_10.pth. To continue, run `python tools/train.py my.py --work-dir out --resume`\n'
    )
    signal.signal(signal.SIGINT, before)


def test_workers_that_the_same_signal_ends_raise_no_error_after_the_message(end: Any) -> None:
    def error_of_a_loader(number: int, frame: object) -> None:
        raise RuntimeError('DataLoader worker is killed by signal: Terminated.')

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGCHLD, error_of_a_loader)
    code, _ = end(lambda: signal.raise_signal(signal.SIGTERM))
    # A worker ends while the process exits.
    subprocess.run(['true'], check=True)
    assert code == 143 and signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def test_other_processes_leave_the_message_to_the_first(end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(os.environ, 'RANK', '1')
    assert end(lambda: signal.raise_signal(signal.SIGTERM)) == (143, '')
    signal.signal(signal.SIGTERM, before)
    error = UserError('a message')
    error.shown_by_peer = True
    assert end(fail(error)) == (2, '')


def test_signals_that_nohup_ignores_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.interruptible() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_process_is_ended_by_a_signal_as_by_default() -> None:
    with cli.interruptible() as received:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert received.signal is None


def test_a_dead_process_is_named_as_the_reason(end: Any) -> None:
    text = '[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3'
    code, message = end(fail(RuntimeError(text)))
    assert code == 2
    assert message.startswith('error: another process of this run ended') and text in message
    assert message.count('\n') == 1


def test_a_failed_evaluation_has_its_own_code(end: Any) -> None:
    assert end(fail(NotEvaluatedError('trained, not evaluated'))) == (3, 'error: trained, not evaluated\n')


def test_a_log_file_on_a_full_disk_is_said_once(end: Any) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, 'No space left on device')

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    def act() -> None:
        handler = logging.FileHandler('out/run.log', delay=True)
        handler.stream = Full()  # type: ignore[assignment]
        for _ in range(3):
            handler.handle(logging.makeLogRecord(dict(msg='text')))
        sys.exit(0)

    code, message = end(act)
    assert code == 0
    assert message.count('\n') == 1
    assert 'run.log is not complete' in message and 'No space left' in message


def test_every_cause_of_a_failed_write_has_a_remedy() -> None:
    for number, words in (
        (errno.EEXIST, 'in its place'),
        (errno.EPERM, 'write access'),
        (errno.EIO, 'free disk space'),
    ):
        with pytest.raises(UserError, match=words), disk_errors(Path('x')):
            raise OSError(number, 'x')


def test_ctrl_c_of_a_real_run_keeps_its_shards_and_the_printed_command_continues(repo: Path, tmp_path: Path) -> None:
    """One process makes drawn pictures, is stopped by SIGINT, and the command of its message completes the set."""
    command = [sys.executable, '-m', 'mmzsq.generate', '--procedural', '64', '--size', '64', '--work-dir', 'pictures']
    env = dict(os.environ, PYTHONPATH=str(repo))
    stopped = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    records = tmp_path / 'pictures' / 'calibration_set' / 'shards'
    for _ in range(1200):
        if list(records.glob('[0-9]*.json')):
            break
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    message = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130
    assert 'Traceback' not in message
    line = message.splitlines()[-1]
    assert line.startswith('stopped by SIGINT. Kept: ')
    kept = {path.name: path.stat().st_mtime_ns for path in records.glob('[0-9]*.json')}
    assert (
        f'{len(kept)} finished shard{"s" if len(kept) > 1 else ""} of the calibration set in pictures/calibration_set'
        in line
    )
    again = [sys.executable, *shlex.split(line.split('`')[1])[1:]]
    subprocess.run(again, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    assert (tmp_path / 'pictures' / 'calibration_set' / 'manifest.json').exists()
    assert {name: (records / name).stat().st_mtime_ns for name in kept} == kept


def test_a_signal_is_handled_after_benchmarks_of_openvino(repo: Path, tmp_path: Path) -> None:
    """On CPUs with AMX, a freed stack for signals would crash the process."""
    pytest.importorskip('openvino')
    script = """
import gc, signal
import numpy as np, onnx
from onnx import TensorProto, helper
from deploy_sessions import BoundSession
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in 'xy')
graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9), 'm.onnx')
opened = [BoundSession('m.onnx', 'openvino', 1, np.ones((1, 3, 4, 4), np.float32)) for _ in range(3)]
while opened:
    opened.pop(0).run()
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print('handled')
"""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (repo, repo / 'benchmarks'))))
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr
