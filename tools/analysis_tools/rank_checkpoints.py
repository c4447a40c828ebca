# SPDX-License-Identifier: Apache-2.0
"""Rank checkpoints of a student without real data, and compare with their accuracy if there is real data.

    python tools/generate.py configs/zsq/yolov5-n_w4a4.py --work-dir work_dirs/held_out \
        --cfg-options zsq.calibration_set.num_images=64 zsq.calibration_set.seed=1
    python tools/analysis_tools/rank_checkpoints.py configs/zsq/yolov5-n_w4a4.py \
        --held-out work_dirs/held_out/calibration_set --checkpoints work_dirs/yolov5-n_w4a4/*.pth --out ranks.json

The criterion is the training loss of the student without augmentation, on a held-out set of synthetic images of another
seed; lower is better. If the config has evaluation data, accuracies are measured, too, with Spearman's and Kendall's
correlation between the two rankings. All checkpoints must be of one config. ``ptq.pth``, the student before training,
may be one of them.
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
from mmzsq.engine.evaluation import evaluate
from mmzsq.errors import UserError
from mmzsq.qat.sensitivity import mean_loss
from mmzsq.synthesis import CalibrationSet


def main() -> None:
    """Parse the command line, measure, print, write."""
    options = cli.parser((__doc__ or '').split('\n')[0])
    options.add_argument('--checkpoints', type=Path, nargs='+', required=True, help='checkpoints of the student')
    options.add_argument(
        '--held-out', type=Path, required=True, help='folder of a calibration set not used for training'
    )
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    args = options.parse_args()
    for path in args.checkpoints:
        if not path.is_file():
            raise UserError(f'checkpoint {path} does not exist')
    if args.launcher != 'none':
        raise UserError('rank_checkpoints.py runs in one process: leave out --launcher')
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
    """Measure the loss of each checkpoint on the images of the runner, and its accuracy if there is evaluation data.

    Args:
        runner: Runner of the student's config, with the held-out set as its calibration set.
        checkpoints: Paths of the checkpoints.

    Returns:
        One entry per checkpoint: ``checkpoint``, ``loss``, and ``metrics`` with evaluation data.
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
    """Correlate the ranking by decreasing loss with that by box AP.

    Args:
        rows: Returned by :func:`measure`.

    Returns:
        Correlations and accuracies; empty without accuracies or with a single checkpoint.
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
    """Return the name of the mean box AP, or of the first metric; AP of single categories may precede the mean."""
    return next((name for name in metrics if name.endswith('bbox_mAP')), next(iter(metrics)))


def _seed(calibration_set: CalibrationSet) -> int | None:
    manifest = calibration_set.manifest or {}
    seed = manifest.get('fingerprint', {}).get('seed')
    return None if seed is None else int(seed)


def _table(rows: list[dict[str, Any]]) -> Table:
    metrics = [main_metric(rows[0]['metrics'])] if rows[0].get('metrics') else []
    table = Table(title='by increasing loss on held-out images')
    table.add_column('checkpoint', overflow='fold')
    for name in ('loss', *metrics):
        table.add_column(name, justify='right')
    for row in sorted(rows, key=lambda row: row['loss']):
        table.add_row(row['checkpoint'], f'{row["loss"]:.4f}', *(f'{row["metrics"][name]:.3f}' for name in metrics))
    return table


if __name__ == '__main__':
    cli.run(main)
