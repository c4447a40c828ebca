# SPDX-License-Identifier: Apache-2.0
"""Make the calibration set of a config: ``python -m mmzsq.generate CONFIG``.

Training makes the set if it is missing. This tool makes it beforehand, for instance on another machine, and continues
where a stopped run left off. With ``--format``, it also writes the set in the layout that another tool calibrates on.
``--dry-run`` makes a few images only, and forecasts health, time and memory of the whole run.

``python -m mmzsq.generate --procedural 300 --size 640 --format openvino`` makes procedural pictures instead, without a
config or a detector.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger

from mmzsq import cli
from mmzsq.config.compose import detector_section
from mmzsq.datasets.set_formats import Preprocessing, check_format, write_format
from mmzsq.engine.console import ConsoleProgress
from mmzsq.engine.forecast import forecast
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet, ProceduralGenerator
from mmzsq.version import __version__

OF_PICTURES = ('size', 'seed', 'mean', 'std', 'bgr')
"""Options that apply to ``--procedural`` only."""


def main() -> None:
    """Parse the command line and generate."""
    args = _parse_args()
    if args.format is None and args.format_dir is not None:
        raise UserError('--format-dir names the folder of --format: add --format NAME')
    if args.procedural is not None:
        _draw(args)
    else:
        _generate(args)


def _generate(args: argparse.Namespace) -> None:
    """Make the set of a config."""
    given = [f'--{name}' for name in OF_PICTURES if getattr(args, name) is not None]
    if given:
        raise UserError(f'{", ".join(given)} only go with --procedural: a config sets them for its detector')
    cfg = cli.load_config(args)
    if 'zsq' not in cfg:
        raise UserError(
            f'config {args.config} has no zsq section: add a base such as '
            "'mmzsq::_base_/zsq_w4a8.py' beside the detector's config"
        )
    out = None
    if args.format is not None:
        out = Path(args.format_dir or Path(cfg.work_dir, f'calibration_{args.format}'))
        # Before hours go into images.
        check_format(args.format, out)
    preprocessing = Preprocessing.from_config(detector_section(cfg).get('data_preprocessor') or {})
    runner = cli.build_runner(cfg)
    if args.dry_run:
        forecast(runner)
        return
    runner.generate()
    if out is not None and is_main_process():
        write_format(CalibrationSet.load(runner.cfg.zsq.calibration_set.dir), args.format, out, preprocessing)
        runner.logger.info(f'the calibration set for {args.format} is in {out}')


def _draw(args: argparse.Namespace) -> None:
    """Make a set of procedural pictures."""
    if args.config is not None or args.cfg_options is not None:
        raise UserError(
            '--procedural takes no config. For pictures in the size of a detector, give its config with '
            '--cfg-options zsq.calibration_set.source=procedural instead'
        )
    sides = args.size or [640]
    if len(sides) > 2 or min(sides) < 1:
        raise UserError(f'--size is {" ".join(map(str, sides))}, but must be one side or HEIGHT WIDTH in pixels')
    if args.procedural < 1:
        raise UserError(f'--procedural is {args.procedural}, but must be the number of pictures, at least 1')
    seed = args.seed or 0
    if seed < 0:
        raise UserError(f'--seed is {seed}, but must be at least 0')
    std = tuple(args.std or (255.0,) * 3)
    if not all(0 < value < math.inf for value in std):
        raise UserError(f'--std is {" ".join(map(str, std))}, but must be three positive numbers')
    mean = tuple(args.mean or (0.0,) * 3)
    if not all(map(math.isfinite, mean)):
        raise UserError(f'--mean is {" ".join(map(str, mean))}, but must be three finite numbers')
    preprocessing = Preprocessing(mean, std, not args.bgr)
    folder = Path(args.work_dir or 'work_dirs/procedural')
    out = None
    if args.format is not None:
        out = Path(args.format_dir or folder / f'calibration_{args.format}')
        check_format(args.format, out)
    cli.note_folders(folder, folder / 'calibration_set')
    logger = MMLogger.get_instance('mmzsq')
    generator = ProceduralGenerator((sides[0], sides[-1]), seed)
    made = CalibrationSet.open(
        folder / 'calibration_set',
        fingerprint=generator.fingerprint,
        num_images=args.procedural,
        shard_size=generator.shard_size,
        classes=('object',),
        versions=dict(mmzsq=__version__),
    )
    with made.lock(lambda: logger.warning(f'another run makes the pictures in {made.root}: waiting until it ends')):
        missing = made.missing_shards()
        with ConsoleProgress(
            logger, 'procedural pictures', sum(map(made.shard_length, missing)), 'pictures'
        ) as progress:
            generator.generate(made, missing, lambda shard: progress.advance(made.shard_length(shard)))
        made.merge()
    logger.info(f'{args.procedural} pictures are in {made.root}')
    if out is not None:
        write_format(made, args.format, out, preprocessing)
        logger.info(f'the pictures for {args.format} are in {out}')


def _parse_args() -> argparse.Namespace:
    options = cli.parser(
        'Make the calibration set of a config with a zsq section, or procedural pictures.', needs_config=False
    )
    options.add_argument(
        '--format',
        metavar='NAME',
        help='also write the set for another tool: coco, yolo, npy, openvino, tensorrt, rknn or hailo',
    )
    options.add_argument('--format-dir', metavar='DIR', help='folder of --format (default: WORK_DIR/calibration_NAME)')
    options.add_argument(
        '--dry-run',
        action='store_true',
        help='make 8 images in WORK_DIR/dry_run, and forecast health, time and memory of the whole run',
    )
    options.add_argument(
        '--procedural', type=int, metavar='N', help='make N procedural pictures; needs no config and no detector'
    )
    pictures = options.add_argument_group('options of --procedural')
    pictures.add_argument(
        '--size', type=int, nargs='+', metavar='PIXELS', help='one side, or height and width (default: 640)'
    )
    pictures.add_argument('--seed', type=int, help='seed of the pictures (default: 0)')
    for name, default in (('mean', 0), ('std', 255)):
        pictures.add_argument(
            f'--{name}',
            type=float,
            nargs=3,
            metavar='VALUE',
            help=f'normalization of the network, for pixels in [0, 255] (default: {default} {default} {default})',
        )
    pictures.add_argument('--bgr', action='store_true', default=None, help='the network takes BGR (default: RGB)')
    args = options.parse_args()
    if args.config is None and args.procedural is None:
        options.error('give a config, or --procedural N')
    return args


if __name__ == '__main__':
    cli.run(main)
