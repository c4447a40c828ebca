# SPDX-License-Identifier: Apache-2.0
"""What the command line tools share: their options, how a config is read, how a mistake is told.

The options are those of MMDetection's own tools. A user's mistake ends a tool with one message on
standard error and exit code 2; anything else is a defect and keeps its traceback.
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


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all tools have.

    Args:
        description: What the tool does, one sentence.
    """
    options = argparse.ArgumentParser(description=description)
    options.add_argument('config', help='path of the config')
    options.add_argument(
        '--work-dir',
        help='folder for logs, checkpoints and results (default: work_dir of the config, else '
        './work_dirs/<name of the config>)',
    )
    options.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings that replace those of the config, as KEY=VALUE: zsq.quantizer.w_bits=6. '
        'Lists are written KEY="[a,b]", quoted and without spaces',
    )
    options.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes (default: none, one process)',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    options.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return options


def write_json(content: Mapping[str, Any], path: Path | None) -> None:
    """Write ``content`` to a file, whose folder is made, or to standard output if ``path`` is None."""
    text = json.dumps(content, indent=2) + '\n'
    if path is None:
        sys.stdout.write(text)
    else:
        # What took minutes to measure is not lost for want of a folder.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the command line names and overlay the options it gives.

    Args:
        args: What a parser made by :func:`parser` returned.

    Returns:
        The config with ``launcher`` and ``work_dir`` set.

    Raises:
        UserError: If the file is missing or cannot be read, whatever the reason: a config is the
            user's code.
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
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', path.stem))
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner that ``runner_type`` names, MMEngine's own where there is none."""
    setup_cache_size_limit_of_dynamo()
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _join_processes_on_cpu(cfg)
    return RUNNERS.build(cfg)


def run(main: Callable[[], None]) -> None:
    """Run a tool's ``main`` and end the process with code 2 and one message on a user's mistake."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f'error: {error}\n')
        sys.exit(2)
    leave_processes()


def leave_processes() -> None:
    """End what joins this process to others, if anything does.

    Else its threads may still be at work when the interpreter ends, which then aborts now and again.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join_processes_on_cpu(cfg: Config) -> None:
    # MMEngine selects a CUDA device before it joins processes, unless they are joined already, and
    # gives DistributedDataParallel that device, unless the config says otherwise.
    torch.distributed.init_process_group('gloo')
    wrapper = dict(dict(type='MMDistributedDataParallel'), **(cfg.get('model_wrapper_cfg') or {}))
    kind = resolve_class(MODEL_WRAPPERS, wrapper['type'])
    # Others, such as that of a composed config, know no such argument.
    if kind is not None and issubclass(kind, DistributedDataParallel):
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)
