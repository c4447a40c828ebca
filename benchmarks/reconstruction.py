# SPDX-License-Identifier: Apache-2.0
"""Measure post-training quantization of YOLOv5-n with and without reconstruction, on procedural pictures.

    python benchmarks/reconstruction.py --bits w4a8 w4a4 --seeds 0 1

Each run draws its pictures, initializes the quantizers, reconstructs the student, and evaluates it with and without
that. Nothing is trained, and no real image is read before the evaluations. Results are added to
``benchmarks/results/yolov5-n_reconstruction.json``, and results_page.py writes them to docs/results.md. Runs that are
there already are left out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.config.sections import ReconstructionConfig
from mmzsq.engine import ZeroShotRunner
from mmzsq.engine.evaluation import build_evaluation, evaluate
from mmzsq.engine.progress import ReconstructionProgress
from mmzsq.errors import UserError
from mmzsq.qat.reconstruct import Reconstructor

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'benchmarks' / 'results' / 'yolov5-n_reconstruction.json'
OPTIONS: dict[str, Any] = {'zsq.train.image_size': 320}
"""Settings of all runs on top of those of the preset: a quarter of the pixels takes a quarter of the time."""
BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')


def main() -> None:
    """Run what is missing, and write the results after each evaluation."""
    args = _parse_args()
    os.chdir(ROOT)
    kept = json.loads(args.out.read_text(encoding='utf-8')) if args.out.is_file() else []
    for seed, bits in itertools.product(args.seeds, args.bits):
        if any((run['bits'], run['seed']) == (bits, seed) for run in kept):
            continue
        try:
            for run in measure(bits, seed, args.work_dir, {**OPTIONS, **(args.cfg_options or {})}):
                write_atomically(args.out, to_json([*kept, run], indent=2))
        except UserError as error:
            raise SystemExit(f'error: {error}') from None
        kept.append(run)
        sys.stdout.write(f'{json.dumps(run)}\n')


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--bits', nargs='+', choices=BITS, default=['w4a8', 'w4a4'])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--out', type=Path, default=OUT, help=f'file of results (default: {OUT.relative_to(ROOT)})')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/reconstruction'))
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='settings on top of those of the preset')
    return parser.parse_args()


def measure(bits: str, seed: int, work: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Quantize with one set of pictures, and evaluate with and without the reconstruction.

    Args:
        bits: One of :data:`BITS`.
        seed: Seed of the pictures and of the reconstruction.
        work: Folder of sets and logs.
        options: Settings by dotted key.

    Yields:
        Bits, seed, options, AP and AP50 of the students evaluated so far, and the time of each part in minutes: after
        the evaluation of the reconstructed student, and after that of the other one.
    """
    cfg = Config.fromfile(f'configs/zsq/yolov5-n_{bits}.py')
    cfg.work_dir = str(work / f'{bits}_seed{seed}')
    sets = {'zsq.calibration_set.seed': seed, 'zsq.calibration_set.dir': str(work / f'set_seed{seed}')}
    cfg.merge_from_dict({'zsq.preset': 'reconstruct', **sets, **options})
    runner = ZeroShotRunner.from_cfg(cfg)
    detector = runner.detector
    minutes: dict[str, float] = {}
    # The training data set appears with the pictures. The evaluation is built last.
    validation, runner._val_loop = runner._val_loop, None
    _timed(minutes, 'pictures', runner.generate)
    detector.init_weights()
    detector.eval()
    batches = list(
        itertools.islice(runner.build_dataloader(runner._train_dataloader), runner.cfg.zsq.train.init_batches)
    )
    _timed(minutes, 'steps', lambda: detector.initialize_quantizers(batches))
    plain = copy.deepcopy(detector.state_dict())
    reconstructor = Reconstructor(**ReconstructionConfig(**runner.cfg.zsq.reconstruction).model_dump(), seed=seed)
    cpu = time.process_time()
    with ReconstructionProgress(runner.logger) as progress:
        _timed(minutes, 'reconstruction', lambda: reconstructor.run(detector, batches, progress.update_unit))
    minutes['reconstruction, of one core'] = round((time.process_time() - cpu) / 60, 2)
    runner._val_loop = validation
    build_evaluation(runner)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    metrics = dict(reconstructed=_evaluate(runner))
    run = dict(bits=bits, seed=seed, options=options, metrics=metrics, minutes=minutes, device=device)
    yield run
    detector.load_state_dict(plain)
    yield dict(run, metrics=dict(metrics, ptq=_evaluate(runner)))


def _evaluate(runner: Any) -> dict[str, float]:
    runner.detector.eval()
    measured = evaluate(runner)
    return {name: measured[f'coco/{name}'] for name in ('bbox_mAP', 'bbox_mAP_50')}


def _timed(minutes: dict[str, float], name: str, function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    minutes[name] = round((time.perf_counter() - start) / 60, 2)
    return result


if __name__ == '__main__':
    main()
