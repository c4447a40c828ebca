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
        '--threads', type=int, default=0, metavar='N', help='threads of the engine (default: the engine decides)'
    )


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
        cfg.launcher = args.launcher
        if args.cfg_options is not None:
            cfg.merge_from_dict(args.cfg_options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}') from error
    if cfg.get('model') is None:
        raise UserError(f"config {path} has no model: add the detector's config to its _base_")
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', path.stem))
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner that ``runner_type`` names.

    By default, a config with a ``zsq`` section gets the zero-shot runner, and any other config MMEngine's.

    Raises:
        UserError: If the config names a class that is not registered.
    """
    setup_cache_size_limit_of_dynamo()
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _join_processes_on_cpu(cfg)
    if 'zsq' in cfg:
        cfg.setdefault('runner_type', ZERO_SHOT_RUNNER)
    try:
        return RUNNERS.build(cfg)
    except KeyError as error:
        text, separator, _ = str(error.args[0]).partition(' Please check whether')
        if not separator:
            raise
        raise UserError(f'{text} Correct the name, or import its module by custom_imports in the config.') from error


def run(main: Callable[[], None]) -> None:
    """Run a tool's ``main``. On a user's mistake, print one message and end the process with code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f'error: {error}\n')
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
