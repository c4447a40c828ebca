# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: losses, throughput and previews of the synthesis, and the layers that bit allocation measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from mmengine.dist import get_rank
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.errors import UserError
from mmzsq.quantization.reconstruction import Errors
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator, Stage, StepProgress
from mmzsq.visualization import save_gallery

PREVIEW_IMAGES = 8

FORMING_IMAGES = 6
"""Images of the first batch whose states are kept."""

FORMING_STATES = 7
"""States of a stage that are kept at most."""

FORMING_SIDE = 144
"""Side of these images, in pixels."""

MEASURING = dict(bits='initializing each number of bits', layers='measuring layers')
"""What happens in each phase of :func:`~mmzsq.qat.sensitivity.measure_sensitivity`."""


class AllocationProgress:
    """Logs how many layers bit allocation has measured, and the time that the others will take.

    Args:
        logger: Receives the lines.
        log_seconds: Minimum time between two lines of a phase, in seconds.
    """

    def __init__(self, logger: MMLogger, log_seconds: float = 15.0) -> None:
        self.logger = logger
        self.log_seconds = log_seconds

    def update(self, phase: str, done: int, total: int) -> None:
        """Log if it is time to, or if the phase has ended.

        Args:
            phase: A key of :data:`MEASURING`.
            done: Steps of the phase that are done; 0 when it begins.
            total: All steps of the phase.
        """
        now = time.perf_counter()
        if done == 0:
            self.start = self.logged = now
        elif now - self.logged >= self.log_seconds or done == total:
            self.logged = now
            left = (now - self.start) / done * (total - done)
            self.logger.info(f'bits: {MEASURING[phase]}, {done}/{total}, {done / total:.0%}, {left:.0f} s left')


class ReconstructionProgress:
    """Logs each unit that is reconstructed, and the time that the others will take.

    Args:
        logger: Receives the lines.
    """

    def __init__(self, logger: MMLogger) -> None:
        self.logger = logger
        self.start = time.perf_counter()

    def update(self, name: str, errors: Errors, done: int, total: int) -> None:
        """Log a unit that is done.

        Args:
            name: Name of the unit.
            errors: Errors of its output.
            done: Units that are done.
            total: All units.
        """
        left = (time.perf_counter() - self.start) / done * (total - done)
        change = f'error {errors.before:.4f} -> {errors.after:.4f}'
        self.logger.info(f'reconstruction: {done}/{total}, {name}: {change}, {left:.0f} s left')


class PictureProgress:
    """Logs how many procedural pictures are drawn.

    Args:
        logger: Receives the lines.
        total: Number of pictures that this process draws.
        log_seconds: Minimum time between two lines, in seconds.
    """

    def __init__(self, logger: MMLogger, total: int, log_seconds: float = 15.0) -> None:
        self.logger = logger
        self.total = total
        self.log_seconds = log_seconds
        self.done = 0
        self.start = self.logged = time.perf_counter()

    def update(self, pictures: int) -> None:
        """Count pictures, and log if it is time to.

        Args:
            pictures: Number of pictures drawn since the last call.
        """
        self.done += pictures
        now = time.perf_counter()
        if now - self.logged >= self.log_seconds or self.done == self.total:
            self.logged = now
            rate = self.done / (now - self.start)
            self.logger.info(f'procedural pictures: {self.done}/{self.total}, {rate:.3g} pictures/s')


class SynthesisProgress:
    """A progress bar on a terminal, log lines elsewhere, and previews on disk.

    Progress is measured in pixels times iterations, so that a step at 640 px counts as much as 16 steps at 160 px.

    Args:
        runner: The runner whose logger is used.
        generator: The generator of the images.
        calibration_set: The calibration set that receives the images.
        shards: Indices of the shards that this process generates.
        folder: Folder of the previews, one PNG per shard and stage, updated while the stage runs. It also gets the
            losses of each stage as JSON and, in ``forming``, some images of the first batch in several states.
        log_seconds: Minimum time between two log lines, and between two previews of a stage, in seconds.
        share: Share of the images that is synthesized.
    """

    def __init__(
        self,
        runner: Runner,
        generator: CalibrationSetGenerator,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        folder: Path,
        log_seconds: float = 15.0,
        share: float = 1.0,
    ) -> None:
        self.logger = runner.logger
        self.calibration_set = calibration_set
        self.folder = folder
        self.log_seconds = log_seconds
        self.images = share * sum(calibration_set.shard_length(shard) for shard in shards)
        self.total = self.images * sum(stage.work for stage in generator.stages)
        self.done = 0.0
        self._last = (-1, '', 0)
        self._previews = True
        self._losses: dict[str, list[float]] = {}
        self._forming: tuple[int, float] | None = None
        console = Console()
        self.bar = Progress(
            TextColumn('[bold]synthesis'),
            BarColumn(),
            TextColumn('{task.percentage:>3.0f}% {task.description}'),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or get_rank() != 0,
        )

    def __enter__(self) -> SynthesisProgress:
        self.start = self.logged = time.perf_counter()
        self._write_preview(lambda: make_directory(self.folder))
        self.bar.start()
        self.task = self.bar.add_task('', total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, shard: int, stage: Stage, step: StepProgress) -> None:
        """Update the progress bar, the log and the preview after some iterations of a batch.

        Args:
            shard: Index of the shard of the batch.
            stage: The stage that optimizes the batch.
            step: Iteration, losses, images and labels of the batch.
        """
        last_shard, last_stage, last_iteration = self._last
        same_batch = (last_shard, last_stage) == (shard, stage.name) and last_iteration < step.iteration
        steps = step.iteration - (last_iteration if same_batch else 0)
        self._last = (shard, stage.name, step.iteration)
        self.done += steps * len(step.images) * stage.work / stage.iterations
        now = time.perf_counter()
        rate = self.done / (now - self.start)
        losses = ' '.join(f'{name}={value:.4g}' for name, value in step.losses.items())
        text = (
            f'shard {shard} {stage.name} {step.iteration}/{step.iterations} {losses} '
            f'{rate / self.total * self.images:.3g} images/s'
        )
        self.bar.update(self.task, completed=self.done, description=text)
        finished = step.iteration == step.iterations
        # Calls are evenly spaced, and the last one may come before the last iteration.
        last = step.iteration + steps > step.iterations
        self._keep_losses(shard, stage, step, same_batch, last)
        self._keep_state(shard, stage, step, last)
        if now - self.logged < self.log_seconds and not finished:
            return
        self.logged = now
        if self.bar.disable:
            left = (self.total - self.done) / rate
            self.logger.info(f'synthesis: {text}, {self.done / self.total:.0%}, {left:.0f} s left')
        images = _pixels(step.images[:PREVIEW_IMAGES])
        name = f'shard_{shard:05d}_{stage.name}.png'
        labels, classes = step.labels[:PREVIEW_IMAGES], self.calibration_set.classes
        self._write_preview(lambda: save_gallery(self.folder / name, images, labels, classes))

    def _keep_losses(self, shard: int, stage: Stage, step: StepProgress, same_batch: bool, last: bool) -> None:
        """Collect the losses of a stage, and write them at its end."""
        if not same_batch:
            self._losses = dict(iteration=[])
        self._losses['iteration'].append(step.iteration)
        for name, value in step.losses.items():
            self._losses.setdefault(name, []).append(float(f'{value:.5g}'))
        if last:
            path = self.folder / f'shard_{shard:05d}_{stage.name}.json'
            self._write_preview(lambda: write_atomically(path, to_json(self._losses)))

    def _keep_state(self, shard: int, stage: Stage, step: StepProgress, last: bool) -> None:
        """Write images of the first batch of this run, evenly spaced over the iterations of a stage."""
        if self._forming is None:
            self._forming = (shard, 0.0)
        first, share = self._forming
        done = step.iteration / step.iterations
        if get_rank() != 0 or shard != first:
            return
        if done < share:
            # The next stage.
            share = 0.0
        if not last and done - share < 1 / FORMING_STATES:
            return
        self._forming = (first, done)
        tiles = [
            cv2.resize(image, (FORMING_SIDE,) * 2, interpolation=cv2.INTER_AREA)
            for image in _pixels(step.images[:FORMING_IMAGES])
        ]
        row = np.concatenate(tiles, axis=1)[..., ::-1]
        content = cv2.imencode('.jpg', row, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        folder = self.folder / 'forming'

        def write() -> None:
            make_directory(folder)
            write_atomically(folder / f'{stage.name}_{step.iteration:05d}.jpg', content)

        self._write_preview(write)

    def _write_preview(self, write: Callable[[], None]) -> None:
        """Write a preview, or warn once: a run does not need it."""
        if not self._previews:
            return
        try:
            write()
        except UserError as error:
            self._previews = False
            self.logger.warning(f'no more previews: {error}')


def _pixels(images: Tensor) -> np.ndarray:
    """Convert images (N, 3, H, W) in [0, 1] to (N, H, W, 3), uint8."""
    pixels: np.ndarray = (images.float().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels
