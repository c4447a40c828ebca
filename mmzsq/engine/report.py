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
from mmengine.dist import is_main_process
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from rich.console import Console
from rich.table import Table

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.checkpoint import load_from_local, read_checkpoint
from mmzsq.engine.details import class_accuracy, write_details
from mmzsq.engine.evaluation import (
    absent_data,
    build_evaluation,
    damaged_image,
    describe,
    evaluate,
    evaluation_progress,
    log_traceback,
    scalar_metrics,
)
from mmzsq.engine.hooks.quantizer_init_hook import PTQ_FILE
from mmzsq.engine.scores import Detections, collected_detections, evaluation_scores
from mmzsq.errors import UserError
from mmzsq.patching import patched
from mmzsq.qat import ZeroShotDetector
from mmzsq.report.scores import describe_scores
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
REPORTED_SECTIONS = ('calibration_set', 'label_sampler', 'synthesis', 'distillation', 'reconstruction', 'train')


def report_results(
    runner: Runner,
    detector: ZeroShotDetector,
    first_iter: int,
    seconds: Mapping[str, float],
    absent: str | None = None,
) -> str | None:
    """Evaluate, log a table and write ``results.json`` into the work_dir.

    Accuracy is left out with a warning if there is no evaluation data in the config or on this machine, or if the
    evaluation fails. ``results.json`` then has the reason as ``not_evaluated``, all other results, and the metrics of
    the rows that were done.

    Args:
        runner: The runner after training.
        detector: Its model, without a wrapper for distributed training.
        first_iter: Iteration at which this process started training, above 0 if it resumed.
        seconds: Measured times by name, with the time of training as ``'train'``.
        absent: Path of the evaluation data that was missing before training, see
            :func:`~mmzsq.engine.evaluation.check_evaluation`. Data that went missing since is an error.

    Returns:
        A message about an evaluation that failed; None if it succeeded, or without data.

    Raises:
        UserError: If ``results.json`` cannot be written.
    """
    metrics: Metrics = {}
    evaluation_seconds: dict[str, float] = {}
    class_ap: Metrics = {}
    found: dict[str, Detections] = {}
    problem = _evaluate_if_possible(runner, detector, metrics, evaluation_seconds, absent, class_ap, found)
    reason = f'{damaged_image(runner._val_loop)}{describe(problem)}' if isinstance(problem, BaseException) else problem
    if isinstance(problem, str):
        runner.logger.warning(f'accuracy is not measured: {problem}')
    report = detector.report
    section = runner.cfg.zsq
    results = dict(
        config=runner.cfg.filename,
        teacher=detector.teacher_checkpoint,
        teacher_sha256=detector.teacher_sha256,
        preset=section.preset,
        quantizer=section.quantizer.to_dict(),
        metrics=metrics,
        not_evaluated=reason,
        scores=_scores(runner, found) if problem is None else None,
        evaluation_images=_evaluation_images(runner),
        checkpoint=_last_checkpoint(runner),
        model_mb=dict(float=report.size_before, quantized=report.size_after),
        bit_operations=dict(float=report.bops_before, quantized=report.bops_after, image_size=report.image_size),
        calibration_set=_summarize_calibration_set(runner),
        settings=_settings(section),
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
    path = Path(runner.work_dir) / RESULTS_FILE
    if is_main_process():
        # The table first: it is then in the log if the file cannot be written.
        runner.logger.info(f'results in {path}\n{format_table(results)}')
        write_atomically(path, to_json(results, indent=2))
    if not isinstance(problem, BaseException) or isinstance(problem, Exception):
        write_details(runner, detector, class_ap, results)
    if not isinstance(problem, BaseException):
        return None
    if not isinstance(problem, Exception):
        raise problem
    student = Path(runner.work_dir) / (results['checkpoint'] or PTQ_FILE)
    runner.logger.warning(f'the evaluation failed: {reason}')
    log_traceback(runner.logger, problem)
    return (
        f'the student is trained, but its evaluation failed: {reason}. {path} has all other results. Correct this and '
        f'evaluate {student} by mmzsq.test'
    )


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
        settings=_settings(section),
    )
    # As JSON has them: tuples are lists.
    expected = json.loads(to_json(expected))
    if not isinstance(results, dict) or any(results.get(key) != value for key, value in expected.items()):
        return False
    meta = read_checkpoint(checkpoint).get('meta', {})
    trained = (results.get('train') or {}).get('iterations')
    evaluated = runner._val_loop is None or bool(results.get('metrics'))
    return Path(checkpoint).resolve().parent == path.resolve().parent and trained == meta.get('iter') and evaluated


def _scores(runner: Runner, found: Mapping[str, Detections]) -> dict[str, Any] | None:
    try:
        return evaluation_scores(runner, found)
    except Exception as error:
        runner.logger.warning(f'the results lack the scores: {describe(error)}')
        return None


def _settings(section: Any) -> dict[str, Any]:
    """Return the plain form of :data:`REPORTED_SECTIONS`."""
    plain: dict[str, Any] = section.to_dict()
    return {key: plain.get(key) for key in REPORTED_SECTIONS}


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
    try:
        calibration_set = CalibrationSet.load(runner.cfg.zsq.calibration_set.dir)
    except UserError as error:
        # Damaged or moved while the student was trained.
        runner.logger.warning(f'the results lack the calibration set: {error}')
        return dict(statistics={}, stages={}, error=str(error))
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


def _evaluate_if_possible(
    runner: Runner,
    detector: ZeroShotDetector,
    metrics: Metrics,
    seconds: dict[str, float],
    absent: str | None,
    class_ap: Metrics,
    found: dict[str, Detections],
) -> BaseException | str | None:
    """Evaluate, and add metrics and times of the rows that are done.

    Returns:
        None after a whole evaluation; why there is none; or the error that ended it.
    """
    if runner._val_loop is None:
        return 'no val_dataloader in the config'
    missing = absent_data(runner)
    if missing is not None and absent is not None:
        return f'the evaluation data is not here ({missing})'
    try:
        build_evaluation(runner)
        _evaluate_all(runner, detector, metrics, seconds, class_ap, found)
    except FileNotFoundError as error:
        if absent is not None:
            return f'the evaluation data is not here ({error.filename or error})'
        return error
    except BaseException as error:
        return error
    return None


def _evaluate_all(
    runner: Runner,
    detector: ZeroShotDetector,
    metrics: Metrics,
    seconds: dict[str, float],
    class_ap: Metrics,
    found: dict[str, Detections],
) -> None:
    @contextmanager
    def row(name: str) -> Iterator[None]:
        with (
            _timed(seconds, f'evaluate_{name}'),
            class_accuracy(runner, class_ap.setdefault(name, {})),
            collected_detections(runner, found, name),
        ):
            yield

    with row('float'), detector.predict_with_teacher():
        metrics['float'] = evaluate(runner, 'evaluation of the teacher')
    if not runner.max_iters:
        # Without training, the student is the PTQ baseline.
        with row('ptq'):
            metrics['ptq'] = evaluate(runner, 'evaluation of PTQ')
        return
    ptq = Path(runner.work_dir) / PTQ_FILE
    if ptq.is_file():
        with row('ptq'), _loaded_weights(detector, ptq):
            metrics['ptq'] = evaluate(runner, 'evaluation of PTQ')
    # The Runner's own loop calls the hooks, and EMAHook swaps in the averaged weights.
    with row('zero_shot'), _counted_batches(runner, 'evaluation of the student'):
        metrics['zero_shot'] = scalar_metrics(runner.val_loop.run())


@contextmanager
def _counted_batches(runner: Runner, title: str) -> Iterator[None]:
    """Show the progress of MMEngine's validation loop inside the block."""
    loop: Any = runner.val_loop
    run_iter = loop.run_iter
    with evaluation_progress(runner, title) as progress:

        def run_and_count(*args: Any, **kwargs: Any) -> None:
            run_iter(*args, **kwargs)
            progress.advance(1)

        with patched(loop, 'run_iter', run_and_count):
            yield


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


@contextmanager
def _loaded_weights(detector: torch.nn.Module, path: Path) -> Iterator[None]:
    """Load the weights of a checkpoint file inside the block, and restore the previous ones after it."""
    own = copy.deepcopy(detector.state_dict())
    detector.load_state_dict(load_from_local(str(path), map_location='cpu')['state_dict'])
    try:
        yield
    finally:
        detector.load_state_dict(own)


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
    scores = results.get('scores')
    return capture.get() if scores is None else f'{capture.get()}{describe_scores(scores)}\n'
