# SPDX-License-Identifier: Apache-2.0
"""Final report of a run: accuracy of teacher, PTQ baseline and student, as a table and as JSON."""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import torch
import torchvision
from mmengine.dist import all_reduce, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from rich.console import Console
from rich.table import Table

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.checkpoint import load_from_local, read_checkpoint
from mmzsq.engine.hooks.quantizer_init_hook import PTQ_FILE
from mmzsq.qat import ZeroShotDetector
from mmzsq.synthesis import CalibrationSet
from mmzsq.version import __version__

ROW_TITLES = dict(
    float='full precision (teacher)', ptq='PTQ, initialized on the synthetic set', zero_shot='zero-shot QAT'
)
ROW_TITLES_REAL_IMAGES = dict(ROW_TITLES, ptq='PTQ, initialized on real images', zero_shot='QAT on real images')
"""Titles for a run on real images (``zsq.calibration_set.real``), which serves as a comparison."""
Metrics = dict[str, dict[str, float]]
"""Metrics by name, for each row of the table."""

RESULTS_FILE = 'results.json'
REPORTED_SECTIONS = ('calibration_set', 'label_sampler', 'synthesis', 'distillation', 'train')


def report_results(runner: Runner, detector: ZeroShotDetector, first_iter: int, seconds: Mapping[str, float]) -> None:
    """Evaluate, log a table and write ``results.json`` into the work_dir.

    If there is no evaluation data in the config or on this machine, accuracy is left out with a warning.

    Args:
        runner: The runner after training.
        detector: Its model, without a wrapper for distributed training.
        first_iter: Iteration at which this process started training, above 0 if it resumed.
        seconds: Measured times by name, with the time of training as ``'train'``.

    Raises:
        UserError: If ``results.json`` cannot be written.
    """
    metrics, evaluation_seconds = _evaluate_if_possible(runner, detector)
    report = detector.report
    section = runner.cfg.zsq
    results = dict(
        config=runner.cfg.filename,
        teacher=detector.teacher_checkpoint,
        preset=section.preset,
        quantizer=section.quantizer.to_dict(),
        metrics=metrics,
        evaluation_images=_evaluation_images(runner),
        checkpoint=_last_checkpoint(runner),
        model_mb=dict(float=report.size_before, quantized=report.size_after),
        bit_operations=dict(float=report.bops_before, quantized=report.bops_after),
        calibration_set=_summarize_calibration_set(runner),
        settings={key: section[key].to_dict() for key in REPORTED_SECTIONS},
        train=dict(iterations=runner.max_iters, **_train_time(runner, first_iter, seconds['train'])),
        seconds={**seconds, **evaluation_seconds},
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
    write_atomically(path, to_json(results, indent=2))
    runner.logger.info(f'results in {path}\n{format_table(results)}')


def reported(runner: Runner, checkpoint: str) -> bool:
    """Return whether ``results.json`` in the work_dir already holds the results of a checkpoint, under this config.

    Results without the accuracy that the config asks for do not count, so that an evaluation can be made up for.

    Args:
        runner: The runner before training.
        checkpoint: Path of the checkpoint that the run continues from.
    """
    path = Path(runner.work_dir) / RESULTS_FILE
    try:
        results = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    section = runner.cfg.zsq
    expected = dict(
        checkpoint=Path(checkpoint).name,
        quantizer=section.quantizer.to_dict(),
        settings={key: section[key].to_dict() for key in REPORTED_SECTIONS},
    )
    # As JSON has them: tuples are lists.
    expected = json.loads(to_json(expected))
    if not isinstance(results, dict) or any(results.get(key) != value for key, value in expected.items()):
        return False
    meta = read_checkpoint(checkpoint).get('meta', {})
    trained = (results.get('train') or {}).get('iterations')
    evaluated = runner._val_loop is None or bool(results.get('metrics'))
    return Path(checkpoint).resolve().parent == path.resolve().parent and trained == meta.get('iter') and evaluated


def _evaluation_images(runner: Runner) -> int:
    # Not the property, which would try again to build a loop that failed.
    loop = runner._val_loop
    return len(loop.dataloader.dataset) if isinstance(loop, BaseLoop) else 0


def _last_checkpoint(runner: Runner) -> str | None:
    """Return the name of the evaluated checkpoint: always the last one, never one selected by accuracy."""
    path = find_latest_checkpoint(runner.work_dir)
    return None if path is None else Path(path).name


def _train_time(runner: Runner, first_iter: int, seconds: float) -> dict[str, float]:
    """Return the number of training images, the first iteration of this process, and its time per image."""
    batch_size = runner.cfg.train_dataloader.batch_size * runner.world_size
    own = (runner.max_iters - first_iter) * batch_size
    time_per_image = dict(ms_per_image=round(1000 * seconds / own, 3)) if own else {}
    return dict(images=runner.max_iters * batch_size, first_iteration=first_iter, **time_per_image)


def _summarize_calibration_set(runner: Runner) -> dict[str, Any]:
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
    source = calibration_set.fingerprint.get('source', 'synthesized')
    return dict(source=source, statistics=calibration_set.statistics(), stages=stages, health=manifest.get('health'))


def _evaluate_if_possible(runner: Runner, detector: ZeroShotDetector) -> tuple[Metrics, dict[str, float]]:
    if runner._val_loop is None:
        runner.logger.warning('no val_dataloader in the config: accuracy is not measured')
        return {}, {}
    try:
        with _raise_on_all_ranks():
            runner._val_loop = runner.build_val_loop(runner._val_loop)
        return _evaluate_all(runner, detector)
    except OSError as error:
        runner.logger.warning(
            f'accuracy is not measured, because the evaluation data cannot be read ({error}); the student is in '
            f'{runner.work_dir}, evaluate it with tools/test.py on a machine with the data'
        )
        return {}, {}


def _evaluate_all(runner: Runner, detector: ZeroShotDetector) -> tuple[Metrics, dict[str, float]]:
    metrics: Metrics = {}
    seconds = {}
    start = time.perf_counter()
    with detector.predict_with_teacher():
        metrics['float'] = evaluate(runner)
    seconds['evaluate_float'] = time.perf_counter() - start
    start = time.perf_counter()
    if not runner.max_iters:
        # Without training, the student is the PTQ baseline.
        metrics['ptq'] = evaluate(runner)
        seconds['evaluate_ptq'] = time.perf_counter() - start
        return metrics, {name: round(value, 3) for name, value in seconds.items()}
    ptq = Path(runner.work_dir) / PTQ_FILE
    if ptq.is_file():
        with _loaded_weights(detector, ptq):
            metrics['ptq'] = evaluate(runner)
        seconds['evaluate_ptq'] = time.perf_counter() - start
    start = time.perf_counter()
    # The Runner's own loop calls the hooks, and EMAHook swaps in the averaged weights.
    metrics['zero_shot'] = _scalar_metrics(runner.val_loop.run())
    seconds['evaluate_zero_shot'] = time.perf_counter() - start
    return metrics, {name: round(value, 3) for name, value in seconds.items()}


@contextmanager
def _loaded_weights(detector: torch.nn.Module, path: Path) -> Iterator[None]:
    """Load the weights of a checkpoint file inside the block, and restore the previous ones after it."""
    own = copy.deepcopy(detector.state_dict())
    detector.load_state_dict(load_from_local(str(path), map_location='cpu')['state_dict'])
    try:
        yield
    finally:
        detector.load_state_dict(own)


@torch.no_grad()
def evaluate(runner: Runner) -> dict[str, float]:
    """Evaluate the current model on the validation data, without calling hooks.

    Args:
        runner: A runner with a built validation loop.

    Returns:
        Metrics by name.

    Raises:
        OSError: If a process cannot read its data.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.eval()
    loop = runner.val_loop
    with _raise_on_all_ranks():
        for batch in loop.dataloader:
            loop.evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    return _scalar_metrics(loop.evaluator.evaluate(len(loop.dataloader.dataset)))


@contextmanager
def _raise_on_all_ranks() -> Iterator[None]:
    """Raise an OSError in all processes if one of them raises it; otherwise the others would wait for that one."""
    error = None
    try:
        yield
    except OSError as found:
        error = found
    failed = torch.tensor(float(error is not None))
    all_reduce(failed, op='max')
    if failed:
        raise error or OSError('another process cannot read its files')


def _scalar_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def format_table(results: Mapping[str, Any]) -> str:
    """Render the accuracies as a plain-text table.

    Args:
        results: Content of ``results.json``, see :func:`report_results`.
    """
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
    trained_on_real = results['calibration_set']['statistics'].get('real', False)
    for row, title in (ROW_TITLES_REAL_IMAGES if trained_on_real else ROW_TITLES).items():
        if row == 'zero_shot' and not results['train']['iterations']:
            continue
        # COCO's evaluator omits metrics if nothing was detected. The accuracy is 0 then.
        values = [f'{metrics[row].get(name, 0.0):.3f}' if row in metrics else '-' for name in names]
        table.add_row(title, *values, f'{sizes["float" if row == "float" else "quantized"]:.2f}')
    console = Console(width=110, no_color=True, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
