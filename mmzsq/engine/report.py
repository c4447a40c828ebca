# SPDX-License-Identifier: Apache-2.0
"""The end of a run: accuracy of teacher, post-training quantization and student, as a table and as JSON."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmdet
import mmengine
import torch
import torchvision
from mmengine.dist import all_reduce, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, find_latest_checkpoint
from rich.console import Console
from rich.table import Table

from mmzsq.checkpoint import load_from_local
from mmzsq.engine.hooks.quantizer_init_hook import PTQ_FILE
from mmzsq.synthesis import CalibrationSet
from mmzsq.version import __version__

if TYPE_CHECKING:
    from mmzsq.engine.runner import ZeroShotRunner

ROWS = dict(float='full precision (teacher)', ptq='PTQ, initialized on the synthetic set', zero_shot='zero-shot QAT')
ROWS_OF_REAL_IMAGES = dict(ROWS, ptq='PTQ, initialized on real images', zero_shot='QAT on real images')
"""Of a run for comparison only: ``zsq.calibration_set.real``."""
RESULTS_FILE = 'results.json'
SETTINGS = ('calibration_set', 'label_sampler', 'synthesis', 'distillation', 'train')


def report_results(runner: ZeroShotRunner) -> None:
    """Evaluate, print one table and write ``results.json`` into the work_dir.

    Without the user's data, or where it is not on this machine, accuracy is left out and the message says so.
    """
    metrics, seconds = _evaluate_rows(runner)
    report = runner.detector.report
    section = runner.cfg.zsq
    results = dict(
        config=runner.cfg.filename,
        teacher=runner.detector.teacher_checkpoint,
        preset=section.preset,
        quantizer=section.quantizer.to_dict(),
        metrics=metrics,
        evaluation_images=_evaluation_images(runner),
        checkpoint=_last_checkpoint(runner),
        model_mb=dict(float=report.size_before, quantized=report.size_after),
        bit_operations=dict(float=report.bops_before, quantized=report.bops_after),
        calibration_set=_read_set(runner),
        settings={key: section[key].to_dict() for key in SETTINGS},
        train=dict(iterations=runner.max_iters, **_train_time(runner)),
        seconds={**runner.seconds, **seconds},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads',
        versions=dict(
            mmzsq=__version__,
            python=platform.python_version(),
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            mmengine=mmengine.__version__,
            mmdet=mmdet.__version__,
        ),
    )
    if not is_main_process():
        return
    path = Path(runner.work_dir) / RESULTS_FILE
    path.write_text(json.dumps(results, indent=2) + '\n')
    runner.logger.info(f'results in {path}\n{format_table(results)}')


def _evaluation_images(runner: ZeroShotRunner) -> int:
    # Not the property, which would build the loop that could not be built.
    loop = runner._val_loop
    return len(loop.dataloader.dataset) if isinstance(loop, BaseLoop) else 0


def _last_checkpoint(runner: ZeroShotRunner) -> str | None:
    """Name of the checkpoint that the accuracy is of: the last one, chosen by nothing."""
    path = find_latest_checkpoint(runner.work_dir)
    return None if path is None else Path(path).name


def _train_time(runner: ZeroShotRunner) -> dict[str, float]:
    """Images seen in all, the iteration that this process started at, and its time for each image it saw."""
    batch_size = runner.cfg.train_dataloader.batch_size * runner.world_size
    own = (runner.max_iters - runner.first_iter) * batch_size
    time_per_image = dict(ms_per_image=round(1000 * runner.seconds['train'] / own, 3)) if own else {}
    return dict(images=runner.max_iters * batch_size, first_iteration=runner.first_iter, **time_per_image)


def _read_set(runner: ZeroShotRunner) -> dict[str, Any]:
    if runner.cfg.zsq.calibration_set.real is not None:
        return dict(statistics=dict(images=len(runner.train_dataloader.dataset), real=True), stages={})
    calibration_set = CalibrationSet.load(runner.cfg.zsq.calibration_set.dir)
    manifest = calibration_set.manifest or {}
    stages: dict[str, dict[str, Any]] = {}
    for shard in manifest['shards']:
        for name, measured in shard['info'].items():
            stage = stages.setdefault(name, dict(measured, seconds=0.0, image_iterations=0, added=0, removed=0))
            stage['seconds'] += measured['seconds']
            stage['image_iterations'] += len(shard['images']) * measured['iterations']
            stage['added'] += measured['added']
            stage['removed'] += measured['removed']
    for stage in stages.values():
        stage['seconds'] = round(stage['seconds'], 3)
        if stage['image_iterations']:
            stage['ms_per_image_iteration'] = round(1000 * stage['seconds'] / stage['image_iterations'], 4)
    return dict(statistics=calibration_set.statistics(), stages=stages)


def _evaluate_rows(runner: ZeroShotRunner) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    if runner._val_loop is None:
        runner.logger.warning('no val_dataloader in the config: accuracy is not measured')
        return {}, {}
    try:
        with _raise_on_all_ranks():
            runner._val_loop = runner.build_val_loop(runner._val_loop)
        return _evaluate_each(runner)
    except OSError as error:
        runner.logger.warning(
            f'accuracy is not measured, the evaluation data is not here ({error}); the student is in '
            f'{runner.work_dir}, evaluate it with tools/test.py where the data is'
        )
        return {}, {}


def _evaluate_each(runner: ZeroShotRunner) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    metrics: dict[str, dict[str, float]] = {}
    seconds = {}
    detector = runner.detector
    start = time.perf_counter()
    with detector.predict_with_teacher():
        metrics['float'] = evaluate(runner)
    seconds['evaluate_float'] = time.perf_counter() - start
    ptq = Path(runner.work_dir) / PTQ_FILE
    if ptq.is_file():
        start = time.perf_counter()
        with _weights_of(detector, ptq):
            metrics['ptq'] = evaluate(runner)
        seconds['evaluate_ptq'] = time.perf_counter() - start
    start = time.perf_counter()
    # The Runner's own loop: hooks see it, an EMA is swapped in.
    metrics['zero_shot'] = _numbers(runner.val_loop.run())
    seconds['evaluate_zero_shot'] = time.perf_counter() - start
    return metrics, {name: round(value, 3) for name, value in seconds.items()}


@contextmanager
def _weights_of(detector: torch.nn.Module, path: Path) -> Iterator[None]:
    """Inside the block ``detector`` has the weights of a file."""
    own = copy.deepcopy(detector.state_dict())
    detector.load_state_dict(load_from_local(str(path), map_location='cpu')['state_dict'])
    try:
        yield
    finally:
        detector.load_state_dict(own)


@torch.no_grad()
def evaluate(runner: ZeroShotRunner) -> dict[str, float]:
    """Run the validation data through the model as it is now; no hook runs."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.eval()
    loop = runner.val_loop
    with _raise_on_all_ranks():
        for batch in loop.dataloader:
            loop.evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    return _numbers(loop.evaluator.evaluate(len(loop.dataloader.dataset)))


@contextmanager
def _raise_on_all_ranks() -> Iterator[None]:
    """Raise in every process if a file could not be read in one, for which the others would wait."""
    error = None
    try:
        yield
    except OSError as found:
        error = found
    failed = torch.tensor(float(error is not None))
    all_reduce(failed, op='max')
    if failed:
        raise error or OSError('another process could not read its files')


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def format_table(results: Mapping[str, Any]) -> str:
    """Render the accuracies of ``results`` (see :func:`report_results`) as a table of plain text."""
    metrics = results['metrics']
    names = [
        name
        for name in dict.fromkeys(name for row in metrics.values() for name in row)
        if name.rsplit('_', 1)[-1] in ('mAP', '50') or name.endswith(('mAP', 'AP50'))
    ]
    quantizer = results['quantizer']
    table = Table(title=f'W{quantizer["w_bits"]}A{quantizer["a_bits"]}, preset {results["preset"]}')
    for column in ('', *names, 'model MB'):
        table.add_column(column, justify='left' if not column else 'right')
    sizes = results['model_mb']
    learnt_from_real = results['calibration_set']['statistics'].get('real', False)
    for row, title in (ROWS_OF_REAL_IMAGES if learnt_from_real else ROWS).items():
        # COCO's evaluator leaves metrics out when nothing was detected: the accuracy is 0 then.
        values = [f'{metrics[row].get(name, 0.0):.3f}' if row in metrics else '-' for name in names]
        table.add_row(title, *values, f'{sizes["float" if row == "float" else "quantized"]:.2f}')
    console = Console(width=110, no_color=True, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
