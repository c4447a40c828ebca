# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a user's data. It is checked before a run, and its failure never loses the results of the run.

Missing data is not an error, because quantization does not need it. Any other error of the evaluation should show
before hours of training. The data set and the metrics are therefore built once before the run, without reading images.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from mmzsq.checkpoint import describe_error
from mmzsq.engine.console import ConsoleProgress
from mmzsq.engine.shared_errors import raise_on_all_ranks
from mmzsq.errors import UserError

NO_EVALUATION = 'val_dataloader=None val_evaluator=None val_cfg=None'

_FAILED = '__failed__'


def check_evaluation(runner: Runner) -> str | None:
    """Build the data set and the metrics of the validation once, if their files are on this machine.

    Annotations are read, images are not. The random state stays as it is.

    Args:
        runner: A runner that has not built its validation loop.

    Returns:
        Path of a file or folder that is missing; None if all are there or the config has no validation.

    Raises:
        UserError: If they cannot be built: damaged annotations, no images, a package that is not installed.
    """
    loader = runner._val_dataloader
    if not isinstance(loader, Mapping):
        return None
    absent = absent_data(runner)
    if absent is None:
        with raise_on_all_ranks(), _unchanged_random_state(), _without_prints():
            try:
                dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
                if hasattr(dataset, 'full_init'):
                    dataset.full_init()
                runner.build_evaluator(copy.deepcopy(runner._val_evaluator))
            except FileNotFoundError as error:
                absent = str(error.filename or error)
            except Exception as error:
                raise UserError(
                    f'the validation data or its metrics cannot be used: {describe(error)}. Correct val_dataloader or '
                    f'val_evaluator, or run without an evaluation: --cfg-options {NO_EVALUATION}'
                ) from error
    if absent is not None:
        runner.logger.warning(f'accuracy will not be measured: the evaluation data is not here ({absent})')
    return absent


def absent_data(runner: Runner) -> str | None:
    """Return a path of the validation data in the config that does not exist, without opening any file.

    Args:
        runner: Its config of the data set, wrappers included, and of the metrics may name ``ann_file`` and
            ``data_prefix``.
    """
    loader = runner._val_dataloader
    dataset = loader['dataset'] if isinstance(loader, Mapping) else None
    paths = [*_data_paths(dataset), *_data_paths(runner._val_evaluator)]
    return next((path for path in paths if '://' not in path and not Path(path).exists()), None)


def _data_paths(node: Any) -> Iterator[str]:
    if isinstance(node, list | tuple):
        for item in node:
            yield from _data_paths(item)
    if not isinstance(node, Mapping):
        return
    prefix = node.get('data_prefix')
    for name in (node.get('ann_file'), *(prefix.values() if isinstance(prefix, Mapping) else ())):
        path = os.path.join(node.get('data_root') or '', name) if isinstance(name, str) else ''
        if path:
            yield path
    for key, value in node.items():
        if key != 'pipeline':
            yield from _data_paths(value)


def describe(error: BaseException) -> str:
    """Return type and message of an error for a sentence."""
    if isinstance(error, UserError):
        return ' '.join(str(error).split())
    if 'need at least one array to concatenate' in ' '.join(str(error).split()):
        # MMEngine's data sets join the records of their images.
        return 'the data set has no images'
    return ' '.join(describe_error(error).split())


def damaged_image(loop: Any) -> str:
    """Name the first image of an evaluation that cannot be decoded, as the beginning of a sentence.

    Args:
        loop: The built loop of the evaluation, or anything else.

    Returns:
        ``'PATH cannot be decoded as an image. '``, or an empty string.
    """
    dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
    try:
        for index in range(len(dataset)):  # type: ignore[arg-type]
            path = dataset.get_data_info(index)['img_path']  # type: ignore[union-attr]
            content = np.fromfile(path, np.uint8)
            if not len(content) or cv2.imdecode(content, cv2.IMREAD_REDUCED_GRAYSCALE_8) is None:
                return f'{path} cannot be decoded as an image. '
    except Exception:
        # Another data set, or files elsewhere: the error itself has to do.
        return ''
    return ''


@contextmanager
def evaluation_errors(logger: logging.Logger, loop: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """Describe any error of an evaluation in one message; its traceback goes to the log file.

    Args:
        logger: The logger of the run.
        loop: Returns the loop of the evaluation, whose images are checked after an error.

    Raises:
        UserError: If the block raises an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log_traceback(logger, error)
        raise UserError(
            f'the evaluation failed: {damaged_image(loop())}{describe(error)}. Check test_dataloader, test_evaluator '
            'and their files; the log file in the work directory has the details'
        ) from error


def log_traceback(logger: logging.Logger, error: BaseException) -> None:
    """Write the traceback of an error to the log files of a logger, and not to the console."""
    record = logging.makeLogRecord(dict(msg='details of the error', levelno=logging.INFO, levelname='INFO'))
    record.exc_info = (type(error), error, error.__traceback__)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def build_evaluation(runner: Runner) -> None:
    """Build the validation loop of a runner. An error of its metrics, which rank 0 computes, ends all processes.

    Args:
        runner: A runner with the config of a validation loop.
    """
    with raise_on_all_ranks(), _without_prints():
        runner._val_loop = runner.build_val_loop(runner._val_loop)
    _share_failures(runner.val_loop.evaluator)


def _share_failures(evaluator: Any) -> None:
    """Let a metric that fails in rank 0 fail in all processes, which otherwise wait for its result."""
    original = evaluator.evaluate
    caught: list[Exception] = []

    def guard(metric: Any, name: str) -> None:
        compute = metric.compute_metrics

        def compute_metrics(results: list[Any]) -> dict[str, Any]:
            try:
                return compute(results)
            except Exception as error:
                caught.append(error)
                return {name: describe(error)}

        metric.compute_metrics = compute_metrics

    def evaluate(size: int) -> dict[str, Any]:
        with _without_prints():
            metrics = original(size)
        if caught:
            raise caught[0]
        for name, value in metrics.items():
            if _FAILED in name:
                raise UserError(value)
        return metrics

    for index, metric in enumerate(getattr(evaluator, 'metrics', ())):
        guard(metric, f'{_FAILED}{index}')
    evaluator.evaluate = evaluate


def evaluation_progress(runner: Runner, title: str) -> ConsoleProgress:
    """Return the progress of an evaluation, which counts batches.

    Args:
        runner: A runner with a built validation loop.
        title: Name of the evaluation on the console.
    """
    dataloader = runner.val_loop.dataloader
    return ConsoleProgress(runner.logger, title, len(dataloader), 'images', len(dataloader.dataset))


@torch.no_grad()
def evaluate(runner: Runner, title: str = 'evaluation') -> dict[str, float]:
    """Evaluate the current model on the validation data, without calling hooks.

    Args:
        runner: A runner with a built validation loop.
        title: Name of this evaluation on the console.

    Returns:
        Metrics by name.

    Raises:
        Exception: Anything that data, model or metrics raise in a process, then in all.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model.eval()
    loop = runner.val_loop
    with raise_on_all_ranks(), evaluation_progress(runner, title) as progress:
        for batch in progress.each(loop.dataloader):
            loop.evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    return scalar_metrics(loop.evaluator.evaluate(len(loop.dataloader.dataset)))


def _without_prints() -> redirect_stdout[io.StringIO]:
    """Drop what pycocotools prints inside the block: some thirty lines a model, which log and results have too."""
    return redirect_stdout(io.StringIO())


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
