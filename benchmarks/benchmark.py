# SPDX-License-Identifier: Apache-2.0
"""Time the steps of a config's zero-shot quantization: synthesis, relabeling and training.

    python benchmarks/benchmark.py configs/zsq/yolov5-s_w4a8.py --what synthesis relabel training \
        --image-size 640 --batch-size 32 --out benchmark.json

Steps are measured as a real run takes them (``benchmark_steps.py``), with peak memory, utilization, the ten most
expensive kernels and whether a CUDA graph ran. Weights are random unless ``--checkpoint`` names a file, since the time
of a step hardly depends on them. On a CPU, choose a small detector and a small image size.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmark_meter import describe_device, describe_versions
from benchmark_steps import Settings, measure_relabeling, measure_synthesis, measure_training
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq import cli
from mmzsq.errors import UserError
from mmzsq.fused_kernels import VARIABLE, fused_kernels_enabled

ROOT = Path(__file__).resolve().parents[1]
MEASURES: dict[str, Callable[[Config, Settings], dict[str, Any]]] = dict(
    synthesis=measure_synthesis, relabel=measure_relabeling, training=measure_training
)


def main() -> None:
    """Parse the command line, measure, write."""
    args = parse(sys.argv[1:])
    cli.write_json(measure(args), args.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse command line arguments, without the name of the program."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument('--what', nargs='+', choices=list(MEASURES), default=list(MEASURES), help='(default: all)')
    options.add_argument(
        '--image-size', type=int, nargs='+', help="side, or height and width, in pixels (default: the config's)"
    )
    options.add_argument('--batch-size', type=int, help="images per step (default: the config's)")
    options.add_argument('--repeats', type=int, default=10, help='measurements of each kind (default: 10)')
    options.add_argument('--steps', type=int, default=5, help='steps per measurement (default: 5)')
    options.add_argument(
        '--precision',
        choices=['fp32', 'bf16'],
        help="sets zsq.synthesis.precision and zsq.train.amp (default: the config's; a CPU computes in fp32)",
    )
    options.add_argument('--checkpoint', help='checkpoint of the float detector (default: random weights)')
    options.add_argument(
        '--general', action='store_true', help=f'use PyTorch operators only, as with {VARIABLE}=0 in the environment'
    )
    options.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    return options.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the steps that the command line selects.

    Args:
        args: Returned by :func:`parse`.

    Returns:
        One entry for each of ``args.what``, the command, the detector, the device and versions.

    Raises:
        UserError: If the config has no ``zsq`` section, or a number is not positive.
    """
    for name in ('repeats', 'steps', 'batch_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} must be at least 1, not {value}')
    sides = args.image_size
    if sides is not None and (len(sides) > 2 or min(sides) < 1):
        raise UserError(f'--image-size takes one or two numbers of pixels, not {" ".join(map(str, sides))}')
    cfg = cli.load_config(args)
    if 'zsq' not in cfg:
        raise UserError(f'config {args.config} has no zsq section')
    if args.precision is not None:
        cfg.merge_from_dict({'zsq.synthesis.precision': args.precision, 'zsq.train.amp': args.precision == 'bf16'})
    register_all_modules()
    device = torch.device(args.device)
    settings = Settings(
        image_size=None if sides is None else (sides[0], sides[-1]),
        batch_size=args.batch_size,
        repeats=args.repeats,
        steps=args.steps,
        checkpoint=args.checkpoint,
        device=device,
    )
    measured: dict[str, Any] = dict(
        config=_in_repository(args.config),
        command=command(args),
        detector=cfg.model.type,
        weights='random' if args.checkpoint is None else _in_repository(args.checkpoint),
        device=describe_device(device),
        versions=describe_versions(device),
        repeats=args.repeats,
        steps=args.steps,
    )
    with fused_kernels(False) if args.general else nullcontext():
        measured['fused_kernels'] = fused_kernels_enabled()
        for name in args.what:
            measured[name] = MEASURES[name](cfg, settings)
    return measured


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Switch the fused kernels on or off inside the block, by the environment variable that users set."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = '1' if enabled else '0'
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def command(args: argparse.Namespace) -> str:
    """Return the command line that repeats a measurement, with paths in the repository and without ``--out``."""
    words = ['python', 'benchmarks/benchmark.py', _in_repository(args.config), '--what', *args.what]
    for name in ('image_size', 'batch_size', 'repeats', 'steps', 'precision', 'checkpoint'):
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [_in_repository(value) if name == 'checkpoint' else value]
            words += ['--' + name.replace('_', '-'), *map(str, values)]
    if args.general:
        words.append('--general')
    if args.cfg_options:
        words += ['--cfg-options', *(f'{key}={value}' for key, value in args.cfg_options.items())]
    return shlex.join(words)


def _in_repository(path: str) -> str:
    """Return a path relative to the root of the repository if it is inside."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else path


if __name__ == '__main__':
    cli.run(main)
