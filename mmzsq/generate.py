# SPDX-License-Identifier: Apache-2.0
"""Make the calibration set of a config: ``python -m mmzsq.generate CONFIG``.

Training makes the set if it is missing. This tool makes it beforehand, for instance on another machine, and continues
where a stopped run left off. With ``--format``, it also writes the set in the layout that another tool calibrates on.
``--dry-run`` makes a few images only, and forecasts health, time and memory of the whole run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.dist import is_main_process

from mmzsq import cli
from mmzsq.config.compose import detector_section
from mmzsq.datasets.set_formats import Preprocessing, check_format, write_format
from mmzsq.engine.forecast import forecast
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet


def main() -> None:
    """Parse the command line and generate."""
    args = _parse_args()
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
    elif args.format_dir is not None:
        raise UserError('--format-dir names the folder of --format: add --format NAME')
    preprocessing = Preprocessing.from_config(detector_section(cfg).get('data_preprocessor') or {})
    runner = cli.build_runner(cfg)
    if args.dry_run:
        forecast(runner)
        return
    runner.generate()
    if out is not None and is_main_process():
        write_format(CalibrationSet.load(runner.cfg.zsq.calibration_set.dir), args.format, out, preprocessing)
        runner.logger.info(f'the calibration set for {args.format} is in {out}')


def _parse_args() -> argparse.Namespace:
    options = cli.parser('Synthesize the calibration set of a config with a zsq section.')
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
    return options.parse_args()


if __name__ == '__main__':
    cli.run(main)
