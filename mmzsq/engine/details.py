# SPDX-License-Identifier: Apache-2.0
"""What ``report.html`` shows beyond ``results.json``, measured after the evaluation of a run.

Everything here reads the finished student and changes nothing. Rank 0 does it alone, and any failure is a warning.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.runner import BaseLoop, Runner
from torch import Tensor

from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.engine.random_state import random_state, set_random_state
from mmzsq.engine.scores import detection_rows
from mmzsq.image_detector import ImageDetector
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization import quantized_layers
from mmzsq.quantization.quantizers import LSQ
from mmzsq.report import DETAILS_FILE, FOLDER, write_report
from mmzsq.report.boxes_of_sets import relative_size
from mmzsq.report.runs import RESULTS_FILE
from mmzsq.report.scores import MIN_SCORE, TEACHER, compare_scores, describe_scores, score_pairs
from mmzsq.visualization.gallery import load_labeled_images

SHOWN_IMAGES = 8
"""Images in the slider."""

SCORED_IMAGES = 32
"""Images on which scores of teacher and student are compared, evenly spaced over the set."""

MEASURED_IMAGES = 4
"""Images of the calibration set on which the inputs of layers are measured."""

LABELED_IMAGES = 2000
"""Images of the evaluation data whose boxes are counted at most."""

IMAGE_SIDE = 480
BINS = 48
CURVE_POINTS = 400
SAMPLED_VALUES = 200_000


def write_details(
    runner: Runner, detector: ZeroShotDetector, class_ap: Mapping[str, Mapping[str, float]], results: dict[str, Any]
) -> None:
    """Measure what the report shows, and write it and ``report.html`` into the work_dir, on rank 0.

    A failure is a warning: the results of the run are written before. Without an evaluation, they receive the scores on
    images of the calibration set, and are written again.

    Args:
        runner: The runner after its evaluation.
        detector: Its model, without a wrapper for distributed training.
        class_ap: AP of each class by its name, for each row of the results.
        results: Content of ``results.json``.
    """
    if not is_main_process():
        return
    state = random_state()
    try:
        folder = Path(runner.work_dir) / FOLDER
        make_directory(folder)
        details = _collect(runner, detector, folder)
        details['class_ap'] = class_ap
        scores = details.get('detections', {}).pop('comparison', None)
        if results['scores'] is None and scores is not None:
            results['scores'] = scores
            runner.logger.info(describe_scores(scores))
            write_atomically(Path(runner.work_dir) / RESULTS_FILE, to_json(results, indent=2))
        write_atomically(folder / DETAILS_FILE, to_json(details))
        runner.logger.info(f'report in {write_report([runner.work_dir])}')
    except Exception as error:
        runner.logger.warning(f'the report is not written: {type(error).__name__}: {error}')
    finally:
        set_random_state(state)


def _collect(runner: Runner, detector: ZeroShotDetector, folder: Path) -> dict[str, Any]:
    """Measure all parts. One that fails is left out with a warning."""
    details: dict[str, Any] = dict(command=_command(), set_dir=_set_dir(runner))
    training = detector.training
    detector.eval()
    parts = dict(
        losses=lambda: _losses(runner),
        detections=lambda: _detections(runner, detector, folder),
        layers=lambda: measure_layers(detector, _calibration_images(runner, MEASURED_IMAGES)),
        real_labels=lambda: _real_labels(runner),
    )
    # The report shows the averaged weights, which were evaluated.
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    try:
        for hook in averages:
            hook.before_val_epoch(runner)
        for name, measure in parts.items():
            try:
                details[name] = measure()
            except Exception as error:
                runner.logger.warning(f'the report lacks {name}: {type(error).__name__}: {error}')
    finally:
        for hook in averages:
            hook.after_val_epoch(runner)
        detector.train(training)
    return details


def _command() -> str:
    """Return the command line of this process, without the folder of its script."""
    program = sys.argv[0]
    spec = getattr(sys.modules.get('__main__'), '__spec__', None)
    words = ['python', '-m', spec.name] if spec is not None else ['python', os.path.basename(program)]
    return ' '.join([*words, *sys.argv[1:]])


def _set_dir(runner: Runner) -> str:
    """Return the folder of the calibration set, relative to the work_dir."""
    return os.path.relpath(runner.cfg.zsq.calibration_set.dir, runner.work_dir)


def _losses(runner: Runner) -> dict[str, Any]:
    """Return the losses and the learning rate of all iterations, averaged so that a curve has few points."""
    curves = {}
    for name, buffer in runner.message_hub.log_scalars.items():
        values, counts = buffer.data
        if not name.startswith('train/') or 'loss' not in name or not len(values):
            continue
        groups = np.array_split(np.asarray(values, float) / np.maximum(counts, 1), min(len(values), CURVE_POINTS))
        ends = np.cumsum([len(group) for group in groups])
        curves[name.removeprefix('train/')] = dict(
            iterations=[int(end) for end in ends], values=[float(f'{group.mean():.5g}') for group in groups]
        )
    return curves


def _detections(runner: Runner, detector: ZeroShotDetector, folder: Path) -> dict[str, Any]:
    """Compare teacher and student on images of the evaluation or, without any, of the calibration set."""
    source, images = _compared_images(runner)
    teacher, student = (_image_detector(network, runner) for network in (detector.load_teacher(), detector.student))
    shown = [index * len(images) // SHOWN_IMAGES for index in range(SHOWN_IMAGES)] if images else []
    rows: list[dict[str, Any]] = []
    name = 'zero_shot' if runner.max_iters else 'ptq'
    found: dict[str, list[np.ndarray]] = {TEACHER: [], name: []}
    for index, image in enumerate(images):
        boxes = [detection_rows(network([image])[0].pred_instances) for network in (teacher, student)]
        for detections, detected in zip(found.values(), boxes, strict=True):
            detections.append(detected)
        if index in shown:
            file = f'image_{len(rows):02d}.jpg'
            size = dict(height=image.shape[0], width=image.shape[1])
            rows.append(dict(file=file, **size, float=_rounded(boxes[0]), quantized=_rounded(boxes[1])))
            write_atomically(folder / file, encode_jpeg(image))
    scores = [[_short(score) for detected in detections for score in detected[:, 4]] for detections in found.values()]
    return dict(
        source=source,
        compared=len(images),
        min_score=MIN_SCORE,
        images=rows,
        pairs=[[_short(score) for score in pair] for pair in score_pairs(found[TEACHER], found[name])],
        scores=dict(float=scores[0], quantized=scores[1]),
        comparison=dict(source=source, **compare_scores(found)),
    )


class PlainDetector:
    """A detector that takes images as they are, without a test pipeline.

    Args:
        detector: A detector of MMDetection, in eval mode.
    """

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[DetDataSample]:
        """Detect objects in images (H, W, 3), uint8 in the order B, G, R.

        Returns:
            One data sample for each image.
        """
        results: list[DetDataSample] = []
        for image in images:
            size = image.shape[:2]
            meta = dict(img_id=0, img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            results += self.detector.test_step(dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=meta)]))
        return results


def _image_detector(detector: Any, runner: Runner) -> ImageDetector | PlainDetector:
    has_pipeline = isinstance(runner.cfg.get('test_dataloader'), Mapping) and isinstance(runner._val_loop, BaseLoop)
    return ImageDetector(detector, runner.cfg) if has_pipeline else PlainDetector(detector)


def _compared_images(runner: Runner) -> tuple[str, list[np.ndarray]]:
    """Return where images come from, and the images, (H, W, 3) uint8 in the order B, G, R."""
    loop = runner._val_loop
    if isinstance(loop, BaseLoop):
        dataset: Any = loop.dataloader.dataset
        load = dataset.pipeline.transforms[0]
        return 'evaluation', [load(dataset.get_data_info(index))['img'] for index in _spread(len(dataset))]
    return 'calibration set', _calibration_images(runner, SCORED_IMAGES)


def _calibration_images(runner: Runner, count: int) -> list[np.ndarray]:
    """Return some images that the student learned from, (H, W, 3) uint8 in the order B, G, R."""
    settings = runner.cfg.zsq.calibration_set
    if settings.real is not None:
        dataset = runner.train_dataloader.dataset
        items = [dataset[index] for index in _spread(len(dataset), count)]
        return [np.ascontiguousarray(item['inputs'].permute(1, 2, 0).numpy()) for item in items]
    images, _, _ = load_labeled_images(settings.dir, _spread(settings.num_images, count))
    return [np.ascontiguousarray(image[..., ::-1]) for image in images]


def _spread(total: int, count: int = SCORED_IMAGES) -> list[int]:
    count = min(total, count)
    return [index * total // count for index in range(count)]


def _rounded(detected: np.ndarray) -> list[list[float]]:
    return [[round(value, 4 if place == 4 else 1) for place, value in enumerate(row)] for row in detected.tolist()]


def encode_jpeg(image: np.ndarray, side: int = IMAGE_SIDE, quality: int = 82) -> bytes:
    """Encode an image (H, W, 3), uint8 in the order B, G, R, as JPEG whose longer side is at most ``side``."""
    scale = min(side / max(image.shape[:2]), 1)
    if scale < 1:
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _real_labels(runner: Runner) -> dict[str, Any] | None:
    """Count the classes of the evaluation data, and list the relative sizes of its boxes; None without data."""
    loop = runner._val_loop
    if not isinstance(loop, BaseLoop):
        return None
    dataset: Any = loop.dataloader.dataset
    counts = [0] * len(dataset.metainfo['classes'])
    sizes = []
    indices = _spread(len(dataset), LABELED_IMAGES)
    for index in indices:
        info = dataset.get_data_info(index)
        if 'instances' not in info or 'height' not in info:
            return None
        for instance in info['instances']:
            if not instance.get('ignore_flag'):
                counts[instance['bbox_label']] += 1
                sizes.append(relative_size(instance['bbox'], info['height'], info['width']))
    return dict(images=len(indices), counts=counts, sizes=sizes)


@torch.no_grad()
def measure_layers(detector: ZeroShotDetector, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Measure weights and inputs of all quantized layers on some images.

    Args:
        detector: Detector with an initialized student in eval mode.
        images: Images that the student learned from, (H, W, 3) uint8 in the order B, G, R.

    Returns:
        One entry for each layer of the student's report: its attributes and, if it is quantized and runs, ``weight``
        and ``input``, see :func:`describe_values`.
    """
    student = detector.student
    measured: dict[str, dict[str, Any]] = {}
    run = PlainDetector(student)
    with _observed(student, measured):
        for image in images:
            run([image])
    rows = []
    for layer in detector.report.to_dict()['layers']:
        row = {key: layer[key] for key in ('name', 'type', 'role', 'weights', 'w_bits', 'a_bits', 'reason', 'macs')}
        rows.append(dict(row, **measured.get(layer['name'], {})))
    return rows


@contextmanager
def _observed(student: Any, measured: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Describe the first tensor of each weight quantizer and input quantizer that runs inside the block."""
    handles = []
    for name, layer in quantized_layers(student):
        for key in ('weight', 'input'):
            quantizer = getattr(layer, f'{key}_quantizer', None)
            if isinstance(quantizer, LSQ):

                def hook(
                    quantizer: LSQ, inputs: tuple[Tensor, ...], output: Tensor, name: str = name, key: str = key
                ) -> None:
                    entry = measured.setdefault(name, {})
                    if quantizer.enabled and key not in entry and inputs[0].numel():
                        entry[key] = describe_values(quantizer, inputs[0], output)

                handles.append(quantizer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def describe_values(quantizer: LSQ, x: Tensor, rounded: Tensor) -> dict[str, Any]:
    """Describe real values and the grid that they are rounded to.

    Args:
        quantizer: An initialized quantizer.
        x: Its input.
        rounded: Its output.

    Returns:
        ``clipped``, the share of values beyond the grid by more than half a step; ``error``, the root of the squared
        rounding error relative to the squared values; ``counts``, a histogram from ``low`` to ``high``, which cover
        all but the 0.05 % of the values at each end and all of the grid; ``grid``, the ends of the grid, averaged over
        channels.
    """
    x, rounded = x.float(), rounded.float()
    step, zero_point = quantizer._grid_for(x)
    zero = torch.zeros_like(step) if zero_point is None else zero_point
    bottom, top = (quantizer.qmin - zero) * step, (quantizer.qmax - zero) * step
    clipped = ((x < bottom - step / 2) | (x > top + step / 2)).float().mean()
    error = ((x - rounded).square().sum() / x.square().sum().clamp(min=1e-20)).sqrt()
    values = x.flatten()[:: max(x.numel() // SAMPLED_VALUES, 1)]
    ends = torch.quantile(values[:SAMPLED_VALUES], torch.tensor([0.0005, 0.9995], device=x.device))
    grid = [float(bottom.mean()), float(top.mean())]
    low, high = min(float(ends[0]), grid[0]), max(float(ends[1]), grid[1])
    counts = torch.histc(values, BINS, low, high) if high > low else torch.zeros(BINS)
    return dict(
        clipped=_short(float(clipped)),
        error=_short(float(error)),
        low=_short(low),
        high=_short(high),
        grid=[_short(end) for end in grid],
        counts=[int(count) for count in counts.tolist()],
    )


def _short(value: float) -> float:
    return float(f'{value:.4g}')


@contextmanager
def class_accuracy(runner: Runner, into: dict[str, float]) -> Iterator[None]:
    """Collect the AP of each class from COCO's metrics that are computed inside the block.

    They do not become metrics of the run: they would fill its log and ``results.json``.

    Args:
        runner: A runner with a built validation loop.
        into: Receives AP by the name of a class.
    """
    metrics = [m for m in getattr(runner.val_loop.evaluator, 'metrics', ()) if hasattr(m, 'classwise')]
    undo = []
    for metric in metrics:
        if metric.classwise or 'bbox' not in getattr(metric, 'metrics', ()):
            continue
        undo.append((metric, metric.__dict__.get('compute_metrics')))
        _collect_classes(runner, metric, into)
    try:
        yield
    finally:
        for metric, wrapped in undo:
            metric.classwise = False
            if wrapped is None:
                del metric.compute_metrics
            else:
                metric.compute_metrics = wrapped


def _collect_classes(runner: Runner, metric: Any, into: dict[str, float]) -> None:
    compute = metric.compute_metrics

    def compute_metrics(results: list[Any]) -> dict[str, Any]:
        def no_table(record: Any) -> bool:
            return '| category' not in str(record.msg)

        for handler in runner.logger.handlers:
            handler.addFilter(no_table)
        metric.classwise = True
        try:
            values: dict[str, Any] = dict(compute(results))
        finally:
            metric.classwise = False
            for handler in runner.logger.handlers:
                handler.removeFilter(no_table)
        for name in [name for name in values if name.endswith('_precision')]:
            value = float(values.pop(name))
            # Not a number: the data has no object of this class.
            if value == value:
                into[name.removesuffix('_precision')] = value
        return values

    metric.compute_metrics = compute_metrics
