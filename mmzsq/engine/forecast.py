# SPDX-License-Identifier: Apache-2.0
"""Forecast of a run: make a few images, measure their health, and extrapolate time and memory.

``python -m mmzsq.generate CONFIG --dry-run`` calls :func:`forecast`. It writes to ``WORK_DIR/dry_run`` alone, so no
later run takes these images for its own. A rehearsal (:mod:`mmzsq.engine.rehearsal`) measures the same steps.
"""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.structures import InstanceData

from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.datasets.collate import stack_images
from mmzsq.engine.console import duration
from mmzsq.engine.hooks.calibration_set_hook import CalibrationSetHook
from mmzsq.errors import UserError
from mmzsq.qat.student_checkpoint import uninitialized
from mmzsq.synthesis import CalibrationSetGenerator, Stage, StepProgress
from mmzsq.synthesis.default_sizes import stages_of
from mmzsq.synthesis.health import ImageHealth, measure
from mmzsq.synthesis.label_samplers import fit_masks, rescale_labels
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.detection_task import data_samples
from mmzsq.visualization import save_gallery

IMAGES = 8
BUDGET_SECONDS = 60.0
"""Time for making the images. A schedule that takes longer is shortened."""

FOLDER = 'dry_run'

CPU_IMAGES = 2
"""Images of a measured step on a CPU, whose time is proportional to their number."""

CPU_STEPS = 3
CUDA_STEPS = 40
"""Measured synthesis steps of a stage. On a GPU the first ones are eager, and one captures."""

CUDA_TRAIN_STEPS = 12
WARM_UP_SHARE = 0.5
"""Share of the measured steps that are not timed."""

LONG_SECONDS = 6 * 3600.0
"""Time of a run on a CPU from which the forecast names shorter ones."""


@dataclass(frozen=True)
class StepCost:
    """Measured cost of a stage of synthesis, or of training.

    Attributes:
        name: Name of the stage, or ``'train'``.
        image_size: Height and width in pixels.
        batch_size: Configured number of images in a step.
        steps: Steps of the whole run for one image (synthesis), or in all (training).
        ms_per_image_iteration: Milliseconds of a step divided by the number of its images.
        seconds: Extrapolated time of the whole run.
        peak_mb: Peak memory of the GPU while measuring; on a CPU, largest resident memory of the process so far.
        captured: Whether steps ran as a CUDA graph; always False on a CPU.
    """

    name: str
    image_size: tuple[int, int]
    batch_size: int
    steps: int
    ms_per_image_iteration: float
    seconds: float
    peak_mb: float
    captured: bool


@dataclass(frozen=True)
class Forecast:
    """What to expect of a run.

    Attributes:
        num_images: Images of the whole run.
        share: Share of the configured iterations that the images of the forecast got.
        health: Health of the images.
        costs: Cost of each stage of synthesis and of training.
        gallery: Picture of the images with their labels.
    """

    num_images: int
    share: float
    health: ImageHealth
    costs: tuple[StepCost, ...]
    gallery: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        costs = [asdict(cost) for cost in self.costs]
        health = self.health.to_dict()
        return dict(num_images=self.num_images, share=self.share, health=health, costs=costs, gallery=str(self.gallery))

    def summary(self) -> str:
        """Return the forecast as lines of text."""
        if self.share < 1:
            schedule = (
                f'{self.share:.1%} of the iterations of the schedule, with all stages at their sizes: images of the '
                'whole run will be better'
            )
        else:
            schedule = 'the whole schedule'
        lines = [f'dry run: {self.health.images} images by {schedule}; see {self.gallery}', self.health.summary()]
        # A shortened schedule ends before objects have taken shape.
        prefix = 'image health' if self.share == 1 else 'image health, may improve with the whole schedule'
        lines += [f'{prefix}: {warning}' for warning in self.health.warnings]
        return '\n'.join([*lines, *cost_lines(self.costs, self.num_images)])


def cost_lines(costs: Sequence[StepCost], num_images: int) -> list[str]:
    """Return one line for each cost, one for their sum, and one with shorter runs if a CPU takes hours.

    Args:
        costs: At least one.
        num_images: Images of the whole run.
    """
    lines = []
    for cost in costs:
        height, width = cost.image_size
        lines.append(
            f'{cost.name}: {height}x{width} px, batches of {cost.batch_size}, '
            f'{cost.ms_per_image_iteration:.3g} ms an image and step, peak memory {cost.peak_mb:.0f} MB, '
            f'whole run {duration(cost.seconds)}'
        )
    total = sum(cost.seconds for cost in costs)
    lines.append(
        f'whole run: {num_images} images and training in about {duration(total)}, without the initialization '
        f'of quantizers and the evaluation; peak memory {max(cost.peak_mb for cost in costs):.0f} MB '
        f'({"GPU" if torch.cuda.is_available() else "resident memory; larger batches take more"})'
    )
    if total > LONG_SECONDS and not torch.cuda.is_available():
        lines.append(
            'without a GPU, zsq.preset=instant takes minutes: it initializes quantizers of 6 to 8 bits on procedural '
            'pictures. Fewer images (zsq.calibration_set.num_images) or iterations (zsq.synthesis) shorten this run'
        )
    return lines


def forecast(runner: Any) -> Forecast:
    """Make images and measure steps for a forecast, log it, and write it to ``WORK_DIR/dry_run``.

    Args:
        runner: A :class:`~mmzsq.engine.ZeroShotRunner` that has not started.

    Raises:
        UserError: If the config takes real images, there are several processes, a setting does not suit the detector,
            or a file cannot be written.
    """
    if get_world_size() > 1:
        raise UserError('--dry-run takes one process: start it without a launcher')
    hook = next((hook for hook in runner.hooks if isinstance(hook, CalibrationSetHook)), None)
    if hook is None:
        raise UserError('--dry-run makes synthetic images: remove zsq.calibration_set.real')
    detector = runner.detector
    task = build_detection_task(detector.load_teacher())
    classes = hook.class_names(detector)
    synthesis, choices = hook.choose_stages(runner, task)
    runner.logger.info('\n'.join(choices))
    generator = CalibrationSetGenerator(task, synthesis, hook.label_sampler, hook.batch_size, hook.seed)
    generator.check_sizes()
    costs = [stage_cost(generator, stage, hook.num_images) for stage in generator.stages if stage.iterations]
    own_seconds = sum(cost.ms_per_image_iteration * cost.steps for cost in costs) * IMAGES / 1000
    share = min(1.0, BUDGET_SECONDS / max(own_seconds, 1e-9))
    short, sampler = _shortened(synthesis, hook.label_sampler, share)
    images, labels, _ = CalibrationSetGenerator(task, short, sampler, IMAGES, hook.seed).make_shard(0, IMAGES)
    folder = Path(runner.work_dir) / FOLDER
    make_directory(folder)
    gallery = folder / 'gallery.png'
    save_gallery(gallery, images, labels, classes)
    health = measure(task, images, labels)
    costs.append(train_cost(runner, images, labels, runner.cfg.zsq, hook.num_images))
    made = Forecast(hook.num_images, share, health, tuple(costs), gallery)
    write_atomically(folder / 'forecast.json', to_json(made.to_dict(), indent=1))
    runner.logger.info(made.summary())
    return made


def _shortened(
    synthesis: dict[str, Any], label_sampler: dict[str, Any], share: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sections with a share of all iterations, and with batches of the few images."""
    synthesis, label_sampler = copy.deepcopy(synthesis), copy.deepcopy(dict(label_sampler))
    for _, stage in stages_of(synthesis):
        stage['batch_size'] = IMAGES
        if share < 1 and stage['iterations']:
            stage['iterations'] = max(round(stage['iterations'] * share), 1)
    for key in ('warmup', 'interval'):
        if share < 1 and isinstance(label_sampler.get(key), int):
            label_sampler[key] = max(round(label_sampler[key] * share), 1)
    return synthesis, label_sampler


def stage_cost(generator: CalibrationSetGenerator, stage: Stage, num_images: int) -> StepCost:
    """Measure steps of a stage of synthesis.

    Args:
        generator: The generator of the whole run.
        stage: One of its stages, with iterations.
        num_images: Images of the whole run.
    """
    task = generator.task
    cuda = task.device.type == 'cuda'
    count = min(stage.batch_size, num_images) if cuda else min(CPU_IMAGES, stage.batch_size)
    labels = generator.sampler.sample(count, stage.image_size, task.num_classes, torch.Generator().manual_seed(0))
    labels = fit_masks(labels, stage.image_size, task.needs_masks)
    steps = CUDA_STEPS if cuda else CPU_STEPS
    stamps: list[tuple[int, float]] = []

    def note(progress: StepProgress) -> None:
        if cuda:
            torch.cuda.synchronize(task.device)
        stamps.append((progress.iteration, time.perf_counter()))

    _reset_peak(task.device)
    result = generator.synthesizer.run(labels, stage.image_size, steps, seed=0, lr=stage.lr, on_progress=note)
    timed = [stamp for stamp in stamps if stamp[0] >= WARM_UP_SHARE * steps - 1]
    (first, start), (last, end) = timed[0], timed[-1]
    ms = 1000 * (end - start) / (last - first) / count
    return StepCost(
        name=stage.name,
        image_size=stage.image_size,
        batch_size=stage.batch_size,
        steps=stage.iterations,
        ms_per_image_iteration=ms,
        seconds=ms * stage.iterations * num_images / 1000,
        peak_mb=_peak_mb(task.device),
        captured=result.captured,
    )


def train_cost(runner: Any, images: np.ndarray, labels: Sequence[InstanceData], zsq: Any, num_images: int) -> StepCost:
    """Measure training steps on images.

    Args:
        runner: The runner, whose student is initialized on the images if it is not yet.
        images: RGB (n, H, W, 3), uint8, in the size of the finished images. They are repeated to fill a batch.
        labels: Labels of each image, in its pixels.
        zsq: The section of the whole run.
        num_images: Images of the whole run.
    """
    detector, train = runner.detector, zsq.train
    device = next(detector.parameters()).device
    cuda = device.type == 'cuda'
    count = train.batch_size if cuda else min(CPU_IMAGES, train.batch_size)
    order = [index % len(images) for index in range(count)]
    batch = _training_batch(images[order], [labels[index] for index in order], zsq)
    if uninitialized(detector.student):
        detector.init_weights()
        detector.initialize_quantizers([copy.deepcopy(batch)])
    optimizer = runner.build_optim_wrapper(copy.deepcopy(runner.cfg.optim_wrapper))
    detector.train()
    _reset_peak(device)
    steps = CUDA_TRAIN_STEPS if cuda else CPU_STEPS
    stamps = []
    for _ in range(steps):
        detector.train_step(copy.deepcopy(batch), optimizer)
        if cuda:
            torch.cuda.synchronize(device)
        stamps.append(time.perf_counter())
    captured = detector.captures_steps
    detector.end_training()
    skipped = math.ceil(WARM_UP_SHARE * (steps - 1))
    ms = 1000 * (stamps[-1] - stamps[skipped]) / (steps - 1 - skipped) / count
    iterations = train.max_epochs * math.ceil(num_images / train.batch_size)
    height, width = batch['inputs'].shape[2:]
    return StepCost(
        name='train',
        image_size=(height, width),
        batch_size=train.batch_size,
        steps=iterations,
        ms_per_image_iteration=ms,
        seconds=ms * train.max_epochs * num_images / 1000,
        peak_mb=_peak_mb(device),
        captured=captured,
    )


def _training_batch(images: np.ndarray, labels: Sequence[InstanceData], zsq: Any) -> dict[str, Any]:
    """Collate images as the data loader of a run does."""
    size = zsq.train.image_size
    height, width = images.shape[1:3] if size is None else (size, size) if isinstance(size, int) else size
    resized = [cv2.resize(image, (width, height))[..., ::-1] for image in images]
    known = rescale_labels(labels, (images.shape[1], images.shape[2]), (height, width))
    samples = data_samples(known, (height, width), torch.device('cpu'))
    items = [
        dict(inputs=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), data_samples=sample)
        for image, sample in zip(resized, samples, strict=True)
    ]
    return stack_images(items, labels=bool(zsq.distillation.detection_weight))


def _reset_peak(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mb(device: torch.device) -> float:
    if device.type == 'cuda':
        return torch.cuda.max_memory_reserved(device) / 2**20
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
