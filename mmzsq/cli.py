# SPDX-License-Identifier: Apache-2.0
"""Options, config loading and error handling that the command line tools share.

The options are those of MMDetection's own tools. Exit codes:

* 0: done.
* 1: a defect, which keeps its traceback; or a file that ``mmzsq.export --verify`` finds wrong.
* 2: a user's mistake, a disk that is full or not writable, or another process of the run that ended: one message on
  standard error.
* 3: the student is trained and its results are written, but the evaluation failed: one message.
* 128 + N: stopped by signal N, 130 for Ctrl-C and 143 for SIGTERM: one line says what is kept and how to continue.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, DictAction
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmzsq.atomic_files import make_directory, remedy, to_json, write_atomically
from mmzsq.config.plain_types import with_plain_types
from mmzsq.config.styles import advice, check_section_is_merged
from mmzsq.errors import NotEvaluatedError, UserError
from mmzsq.registry import resolve_class

ZERO_SHOT_RUNNER = 'mmzsq.ZeroShotRunner'

LAUNCHERS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')
"""Command of each launcher."""

LAUNCHER_VARIABLES = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_LOCAL_RANK')
"""Environment variable that each launcher sets."""


def parser(description: str, needs_config: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options of all tools.

    Args:
        description: One sentence about the tool.
        needs_config: Whether the config must be given.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument('config', nargs=None if needs_config else '?', help='path of the config')
    options.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and results (default: work_dir of the config, else '
        './work_dirs/<name of the config>)',
    )
    add_config_options(options)
    options.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher of the processes (default: none, one process)',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    options.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return options


def add_config_options(options: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of the config.

    Args:
        options: The parser.
    """
    options.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Settings,
        help='settings that override the config, as KEY=VALUE: zsq.quantizer.w_bits=6. '
        'Lists are written KEY="[a,b]", quoted and without spaces',
    )


def add_runtime_options(options: argparse.ArgumentParser) -> None:
    """Add the options of tools that run exported files.

    Args:
        options: The parser.
    """
    options.add_argument(
        '--runtime',
        choices=['openvino', 'onnxruntime'],
        help='engine of an exported file (default: the target that it was exported for)',
    )
    options.add_argument(
        '--threads', type=_count, default=0, metavar='N', help='threads of the engine (default: the engine decides)'
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text} must be an integer of at least 0')
    return int(text)


class _Settings(DictAction):
    """``DictAction`` of MMEngine, with a message instead of a traceback for arguments other than ``KEY=VALUE``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        for value in values:
            name, equals, _ = value.partition('=')
            if not equals or not all(name.split('.')):
                parser.error(f'--cfg-options {value}: write each setting as KEY=VALUE, such as zsq.train.max_epochs=10')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f'--cfg-options {" ".join(values)} cannot be read: {error}')


def name_teacher(cfg: Config) -> None:
    """Set ``zsq.teacher`` to ``load_from``, before ``load_from`` is set to a checkpoint to resume or to test.

    Args:
        cfg: Config, changed in place. It is unchanged without a ``zsq`` section or if ``zsq.teacher`` is set.
    """
    if isinstance(cfg.get('zsq'), Mapping) and not cfg.zsq.get('composed') and cfg.zsq.get('teacher') is None:
        cfg.zsq.teacher = cfg.get('load_from')


def write_json(content: Mapping[str, Any], path: Path | None) -> None:
    """Write ``content`` to a file, creating its folder, or to standard output if ``path`` is None.

    Raises:
        UserError: If the disk is full or not writable.
    """
    if path is None:
        sys.stdout.write(json.dumps(content, indent=2) + '\n')
    else:
        make_directory(path.parent)
        write_atomically(path, to_json(content, indent=2))


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the command line names and overlay the options it gives.

    Args:
        args: What a parser made by :func:`parser` returned.

    Returns:
        The config with ``launcher`` and ``work_dir`` set.

    Raises:
        UserError: If the file is missing, cannot be read, or has no model. A config is code of the user, so that any
            exception counts as a mistake in it.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = Path(args.config)
    if not path.is_file():
        raise UserError(f'config {path} does not exist')
    try:
        cfg = with_plain_types(Config.fromfile(path))
        check_section_is_merged(path)
    except UserError:
        raise
    except Exception as error:
        reason = advice(path, error) or f'{type(error).__name__}: {error}'
        raise UserError(f'config {path} cannot be read: {reason}') from error
    cfg.launcher = args.launcher
    options = args.cfg_options or {}
    try:
        cfg.merge_from_dict(options)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise UserError(
            f'--cfg-options {" ".join(options)} does not fit the config {path}: {text}. Check each key.'
        ) from error
    if cfg.get('model') is None:
        raise UserError(f"config {path} has no model: add the detector's config to its _base_")
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', path.stem))
    elif not isinstance(cfg.work_dir, str):
        raise UserError(f'work_dir is {cfg.work_dir!r}, but must be the path of a folder')
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner that ``runner_type`` names.

    By default, a config with a ``zsq`` section gets the zero-shot runner, and any other config MMEngine's.

    Raises:
        UserError: If the config names a class that is not registered.
    """
    setup_cache_size_limit_of_dynamo()
    variable = LAUNCHER_VARIABLES.get(cfg.launcher)
    if variable is not None and variable not in os.environ:
        raise UserError(
            f'--launcher {cfg.launcher} needs processes of that launcher, but {variable} is not set: start the command '
            f'with {LAUNCHERS[cfg.launcher]}, or drop --launcher'
        )
    work_dir = cfg.get('work_dir')
    if work_dir is not None:
        make_directory(Path(work_dir))
        _RUN.work_dir = Path(work_dir)
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _join_processes_on_cpu(cfg)
    if 'zsq' in cfg:
        cfg.setdefault('runner_type', ZERO_SHOT_RUNNER)
    try:
        runner = RUNNERS.build(cfg)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        if _raised_here(error):
            raise
        raise UserError(
            f'the config cannot be built: {type(error).__name__}: {error}. Correct its section that this names.'
        ) from error
    except KeyError as error:
        if (text := _unregistered(error)) is None:
            raise
        raise UserError(text) from error
    section = getattr(runner, 'cfg', cfg).get('zsq')
    if isinstance(section, Mapping) and isinstance(section.get('calibration_set'), Mapping):
        root = section['calibration_set'].get('dir')
        _RUN.set_dir = None if root is None else Path(root)
    return runner


def _unregistered(error: KeyError) -> str | None:
    """Return the message if an error is that of a name that no registry has."""
    text, separator, _ = str(error.args[0] if error.args else '').partition(' Please check whether')
    return f'{text} Correct the name, or import its module by custom_imports in the config.' if separator else None


def _raised_here(error: Exception) -> bool:
    """Return whether code of this package raised an error. It is then a defect, unless a config can cause it."""
    frame, *_ = reversed(list(traceback.walk_tb(error.__traceback__)))
    return Path(frame[0].f_code.co_filename).is_relative_to(Path(__file__).parent) and frame[0].f_code is not (
        build_runner.__code__
    )


def run(main: Callable[[], None]) -> None:
    """Run a tool's ``main`` and end the process with one of the exit codes above.

    Args:
        main: Parses the command line and does the work.
    """
    _RUN.work_dir = _RUN.set_dir = None
    with interruptible() as interruption, _quiet_log_files():
        try:
            main()
        except UserError as error:
            if interruption.signal is not None:
                _end_interrupted(interruption.signal)
            if not error.shown_by_peer:
                sys.stderr.write(f'error: {error}\n')
            sys.exit(3 if isinstance(error, NotEvaluatedError) else 2)
        except SystemExit:
            raise
        except BaseException as error:
            # Code that was interrupted may raise another error: MMEngine's formatter of configs does.
            if interruption.signal is not None:
                _end_interrupted(interruption.signal)
            message = _explain(error)
            if message is None:
                raise
            sys.stderr.write(f'error: {message}\n')
            sys.exit(2)
    leave_processes()


def _explain(error: BaseException) -> str | None:
    """Return a message about an error of the disk, the network, another process or a registry; None for a defect."""
    if isinstance(error, KeyError):
        # Data sets, transforms and metrics are built when they are needed.
        return _unregistered(error)
    kept = _kept()
    kept = f' Kept: {kept}.' if kept else ''
    if isinstance(error, OSError) and error.errno is not None:
        # Errors while writing into an open file do not name it.
        names = error.filename or (f'a file in {_RUN.work_dir}' if _RUN.work_dir is not None else 'a file')
        return (
            f'cannot read or write {names}: {error.strerror or error}.{kept} To continue, {remedy(error)}, and run '
            f'{_next_command()}'
        )
    network = isinstance(error, getattr(torch.distributed, 'DistError', ()))
    # Without gloo's advice to developers.
    text = str(error).partition('. This is typically')[0].partition('\n')[0]
    if network or (isinstance(error, RuntimeError) and 'gloo' in str(error)):
        return (
            f'another process of this run ended or cannot be reached ({text}); its own message '
            f'says why.{kept} To continue, run {_next_command()}'
        )
    return None


def _end_interrupted(number: int) -> NoReturn:
    """Say what is kept and how to continue, and end the process as the signal asks."""
    for name in _SIGNALS:
        if hasattr(signal, name):
            # A second Ctrl-C must not interrupt the message.
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'SIGCHLD'):
        # Data loaders raise an error when the same signal ends their processes.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if int(os.environ.get('RANK', 0)) == 0:
        kept = _kept() or 'nothing was written yet'
        sys.stderr.write(
            f'stopped by {signal.Signals(number).name}. Kept: {kept}. To continue, run {_next_command()}\n'
        )
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Regular exit may wait for processes that ended.
        os._exit(128 + number)
    sys.exit(128 + number)


def _kept() -> str:
    """List what a run has left on disk: the calibration set, checkpoints and results."""
    kept = []
    root = _RUN.set_dir
    if root is not None and (root / 'manifest.json').exists():
        kept.append(f'the calibration set in {root}')
    elif root is not None and root.is_dir():
        count = len(list(root.glob('shards/[0-9]*.json')))
        kept.append(f'{count} finished shard{"" if count == 1 else "s"} of the calibration set in {root}')
    checkpoint = _last_checkpoint()
    if checkpoint is not None:
        kept.append(f'the checkpoint {checkpoint}')
    if _RUN.work_dir is not None and (_RUN.work_dir / 'results.json').exists():
        kept.append(f'{_RUN.work_dir / "results.json"}')
    return ', '.join(kept)


def _last_checkpoint() -> Path | None:
    if _RUN.work_dir is None:
        return None
    found = [path for name in ('epoch_*.pth', 'iter_*.pth') for path in _RUN.work_dir.glob(name)]
    # A checkpoint is an archive, whose directory comes last: a file that was cut off is none.
    whole = [path for path in found if path.is_file() and zipfile.is_zipfile(path)]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def _next_command() -> str:
    """Return the command that continues this one."""
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    program = ['python', '-m', spec.name] if spec is not None else ['python', sys.argv[0]]
    arguments = sys.argv[1:]
    tool = Path(sys.argv[0]).stem
    if tool == 'stock' and arguments:
        tool = Path(arguments[0]).stem
    if (
        tool == 'train'
        and _last_checkpoint() is not None
        and not any(argument.startswith(('--resume', '--rehearse')) for argument in arguments)
    ):
        arguments = [*arguments, '--resume']
    command = shlex.join([*program, *arguments])
    return f'`{command}` with the same launcher' if 'LOCAL_WORLD_SIZE' in os.environ else f'`{command}`'


@dataclass
class _Run:
    """Folders of the run, for messages."""

    work_dir: Path | None = None
    set_dir: Path | None = None


_RUN = _Run()
_SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP')


def note_folders(work_dir: Path | None = None, set_dir: Path | None = None) -> None:
    """Name the folders of a run for messages; :func:`build_runner` does so by itself.

    Args:
        work_dir: Folder of logs, checkpoints and results.
        set_dir: Folder of the calibration set.
    """
    _RUN.work_dir, _RUN.set_dir = work_dir, set_dir


class Interruption(KeyboardInterrupt):
    """Raised in the main process by a signal that asks it to end."""


@dataclass
class ReceivedSignal:
    """The signal that interrupted a block of :func:`interruptible`, None as long as there was none."""

    signal: int | None = None


@contextmanager
def interruptible() -> Iterator[ReceivedSignal]:
    """Turn the first SIGINT, SIGTERM or SIGHUP inside the block into :class:`Interruption`.

    Signals that the process was started to ignore stay ignored. Child processes keep the default action.
    """
    received = ReceivedSignal()
    own = os.getpid()

    def interrupt(number: int, _frame: Any) -> None:
        if os.getpid() != own and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        received.signal = received.signal or number
        raise Interruption

    previous = {}
    for number in [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_log_files() -> Iterator[None]:
    """Warn once, and continue, if a log file cannot be written; ``logging`` prints a traceback for each line."""
    warned: set[str] = set()

    def warn(handler: logging.FileHandler, _record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if handler.baseFilename not in warned:
            warned.add(handler.baseFilename)
            sys.stderr.write(f'warning: the log file {handler.baseFilename} is not complete: {error}\n')

    logging.FileHandler.handleError = warn  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del logging.FileHandler.handleError


def leave_processes() -> None:
    """Destroy the process group, if there is one.

    Its threads may otherwise still run when the interpreter ends, which then sometimes aborts.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join_processes_on_cpu(cfg: Config) -> None:
    # MMEngine selects a CUDA device before it creates the process group, unless there is one, and passes that device to
    # DistributedDataParallel, unless the config says otherwise.
    torch.distributed.init_process_group('gloo')
    wrapper = dict(dict(type='MMDistributedDataParallel'), **(cfg.get('model_wrapper_cfg') or {}))
    kind = resolve_class(MODEL_WRAPPERS, wrapper['type'])
    # Other wrappers, such as that of a composed config, do not take the argument.
    if kind is not None and issubclass(kind, DistributedDataParallel):
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
