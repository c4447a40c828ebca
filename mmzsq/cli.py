# SPDX-License-Identifier: Apache-2.0
"""Options, config loading and error handling that the command line tools share.

The options are those of MMDetection's own tools. A user's mistake ends a tool with one message on standard error and
exit code 2. Any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, DictAction
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmzsq.errors import UserError
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
    """Write ``content`` to a file, creating its folder, or to standard output if ``path`` is None."""
    text = json.dumps(content, indent=2) + '\n'
    if path is None:
        sys.stdout.write(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')


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
        cfg = Config.fromfile(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error
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
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _join_processes_on_cpu(cfg)
    if 'zsq' in cfg:
        cfg.setdefault('runner_type', ZERO_SHOT_RUNNER)
    try:
        return RUNNERS.build(cfg)
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
    """Run a tool's ``main``. On a user's mistake, print one message and end the process with code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f'error: {error}\n')
        sys.exit(2)
    except KeyError as error:
        # Data sets, transforms and metrics are built when they are needed.
        if (text := _unregistered(error)) is None:
            raise
        sys.stderr.write(f'error: {text}\n')
        sys.exit(2)
    leave_processes()


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
