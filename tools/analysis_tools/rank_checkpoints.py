# SPDX-License-Identifier: Apache-2.0
"""Rank checkpoints of a student without data, and see how far accuracy agrees where there is some.

    python tools/generate.py configs/zsq/yolov5-n_w4a4.py --work-dir work_dirs/held_out \
        --cfg-options zsq.calibration_set.num_images=64 zsq.calibration_set.seed=1
    python tools/analysis_tools/rank_checkpoints.py configs/zsq/yolov5-n_w4a4.py \
        --held-out work_dirs/held_out/calibration_set --checkpoints work_dirs/yolov5-n_w4a4/*.pth --out ranks.json

The criterion is the loss that the student learns from, on synthetic images of another seed that no checkpoint has seen,
without augmentation: the less, the better. Where the config has evaluation data, accuracy is measured too, with
Spearman's and Kendall's correlation between the two rankings. All checkpoints are of one config; ``ptq.pth``, which is
the student before training, may be among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.runner.checkpoint import load_from_local
from rich.console import Console
from rich.table import Table
from scipy import stats

from mmzsq import cli
from mmzsq.engine.report import evaluate
from mmzsq.errors import UserError
from mmzsq.qat.sensitivity import mean_loss
from mmzsq.synthesis import CalibrationSet


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument('--checkpoints', type=Path, nargs='+', required=True, help='of the student')
    options.add_argument('--held-out', type=Path, required=True, help='folder of a set that no checkpoint has seen')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    args = options.parse_args()
    for path in args.checkpoints:
        if not path.is_file():
            raise UserError(f'checkpoint {path} does not exist')
    if args.launcher != 'none':
        raise UserError('checkpoints are ranked by one process')
    cfg = cli.load_config(args)
    if 'zsq' not in cfg:
        raise UserError(f"config {args.config} has no zsq section: give the student's config")
    held_out = CalibrationSet.load(args.held_out)
    cfg.merge_from_dict({'zsq.calibration_set.dir': str(args.held_out)})
    rows = measure(cli.build_runner(cfg), args.checkpoints)
    result = dict(
        config=args.config,
        held_out=dict(images=held_out.statistics()['images'], seed=_seed(held_out)),
        checkpoints=rows,
        correlation=correlation(rows),
    )
    Console(width=120).print(_table(rows))
    cli.write_json(result, args.out)


def measure(runner: Any, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """Loss on the images of the runner, and accuracy if its config has data, of each checkpoint.

    Args:
        runner: Of the student's config, with the set held out in place of its own.
        checkpoints: Files.
    """
    detector = runner.detector
    detector.load_teacher()
    detector.augmentation = None
    batches = list(runner.train_dataloader)
    has_data = runner._val_loop is not None
    if has_data:
        runner._val_loop = runner.build_val_loop(runner._val_loop)
    rows = []
    for path in checkpoints:
        checkpoint = load_from_local(str(path), map_location='cpu')
        detector.load_bits_from(checkpoint)
        detector.load_state_dict(checkpoint['state_dict'])
        detector.eval()
        row: dict[str, Any] = dict(checkpoint=path.name, loss=round(mean_loss(detector, batches), 6))
        if has_data:
            row['metrics'] = evaluate(runner)
        rows.append(row)
    return rows


def correlation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How the ranking by falling loss agrees with that by box AP; empty without accuracies, or of one.

    Args:
        rows: As of :func:`measure`.
    """
    if len(rows) < 2 or not all(row.get('metrics') for row in rows):
        return {}
    metric = main_metric(rows[0]['metrics'])
    better = [-row['loss'] for row in rows]
    accuracies = [row['metrics'][metric] for row in rows]
    return dict(
        metric=metric,
        spearman=round(float(stats.spearmanr(better, accuracies).statistic), 4),
        kendall=round(float(stats.kendalltau(better, accuracies).statistic), 4),
        metric_of_least_loss=accuracies[better.index(max(better))],
        metric_of_last=accuracies[-1],
        best_metric=max(accuracies),
    )


def main_metric(metrics: Mapping[str, float]) -> str:
    """The mean over categories of box AP, or whatever comes first: AP of single categories may."""
    return next((name for name in metrics if name.endswith('bbox_mAP')), next(iter(metrics)))


def _seed(calibration_set: CalibrationSet) -> int | None:
    manifest = calibration_set.manifest or {}
    seed = manifest.get('fingerprint', {}).get('seed')
    return None if seed is None else int(seed)


def _table(rows: list[dict[str, Any]]) -> Table:
    metrics = [main_metric(rows[0]['metrics'])] if rows[0].get('metrics') else []
    table = Table(title='by falling loss on images held out')
    table.add_column('checkpoint', overflow='fold')
    for name in ('loss', *metrics):
        table.add_column(name, justify='right')
    for row in sorted(rows, key=lambda row: row['loss']):
        table.add_row(row['checkpoint'], f'{row["loss"]:.4f}', *(f'{row["metrics"][name]:.3f}' for name in metrics))
    return table


if __name__ == '__main__':
    cli.run(main)
