# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint, float or quantized, or an exported file on the test data of its config.

``python -m mmzsq.test CONFIG CHECKPOINT`` has the options of MMDetection's ``tools/test.py`` except ``--tta``.
``python -m mmzsq.test CONFIG model.onnx`` evaluates a file of ``python -m mmzsq.export`` in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults

from mmzsq import cli
from mmzsq.class_names import check_data
from mmzsq.engine import check_classes, evaluation_config
from mmzsq.engine.evaluation import evaluation_errors
from mmzsq.errors import UserError


def main() -> None:
    """Parse the command line and evaluate."""
    args = _parse_args()
    if args.out is not None and Path(args.out).suffix not in ('.pkl', '.pickle'):
        raise UserError(f'--out writes a pickle: name it *.pkl or *.pickle, not {args.out}')
    cfg = cli.load_config(args)
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        if cfg.get(key) is None:
            raise UserError(f'config {args.config} has no {key}: there is nothing to evaluate on. Add it.')
    exported = Path(args.checkpoint).suffix == '.onnx'
    if exported:
        cfg = evaluation_config(cfg, args.checkpoint, args.runtime, args.threads)
    elif args.runtime is not None or args.threads:
        raise UserError(f'--runtime and --threads are for an exported .onnx file, not for {args.checkpoint}')
    else:
        cli.name_teacher(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if 'zsq' not in cfg:
            cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmzsq.FloatCheckpointHook')]
    check_data(cfg, 'test')
    if args.show or args.show_dir:
        if 'visualization' not in cfg.get('default_hooks', {}):
            raise UserError("--show needs default_hooks.visualization: dict(type='VisualizationHook')")
        cfg = trigger_visualization_hook(cfg, args)
    runner = cli.build_runner(cfg)
    if exported:
        check_classes(args.checkpoint, runner.test_loop.dataloader.dataset.metainfo.get('classes'))
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    with evaluation_errors(runner.logger, lambda: runner._test_loop):
        runner.test()


def _parse_args() -> argparse.Namespace:
    options = cli.parser('Evaluate a checkpoint, float or quantized, or an exported file on the test data.')
    options.add_argument(
        'checkpoint', help='path or URL of a .pth or .safetensors, mmzsq://NAME, or an exported .onnx file'
    )
    cli.add_runtime_options(options)
    options.add_argument('--out', metavar='FILE.pkl', help='write all predictions')
    options.add_argument('--show', action='store_true', help='show predictions in a window')
    options.add_argument('--show-dir', help='paint predictions into this folder, under the work directory')
    options.add_argument(
        '--wait-time', type=float, default=2, metavar='SECONDS', help='duration of each window (default: 2)'
    )
    return options.parse_args()


if __name__ == '__main__':
    cli.run(main)
