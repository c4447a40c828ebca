# SPDX-License-Identifier: Apache-2.0
"""Progress of synthesis and reconstruction: losses and throughput on the console, previews on disk and in backends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from mmengine.dist import get_rank
from mmengine.runner import Runner
from torch import Tensor

from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.engine.backends import Backends
from mmzsq.engine.console import FILE_ONLY, ConsoleProgress, PhaseProgress
from mmzsq.errors import UserError
from mmzsq.quantization.reconstruction import Errors
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator, Stage, StepProgress
from mmzsq.visualization import draw_gallery, save_gallery

PREVIEW_IMAGES = 8

FORMING_IMAGES = 6
"""Images of the first batch whose states are kept."""

FORMING_STATES = 7
"""States of a stage that are kept at most."""

FORMING_SIDE = 144
"""Side of these images, in pixels."""


class ReconstructionProgress(PhaseProgress):
    """Progress of a reconstruction by units. The log file also has the errors of each unit.

    Args:
        logger: Receives the lines.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, dict(units='reconstruction'), 'units')

    def update_unit(self, name: str, errors: Errors, done: int, total: int) -> None:
        """Show that a unit is done.

        Args:
            name: Name of the unit.
            errors: Errors of its output.
            done: Units that are done.
            total: All units.
        """
        change = f'error {errors.before:.4f} -> {errors.after:.4f}'
        self.logger.info(f'reconstruction of {name}: {change}', extra=FILE_ONLY)
        self.update('units', done, total)


class SynthesisProgress:
    """Progress on the console, and previews on disk and in the visualizer backends of the run.

    Progress is measured in pixels times iterations, so that a step at 640 px counts as much as 16 steps at 160 px.

    Args:
        runner: The runner whose logger is used.
        generator: The generator of the images.
        calibration_set: The calibration set that receives the images.
        shards: Indices of the shards that this process generates.
        folder: Folder of the previews, one PNG per shard and stage, updated while the stage runs. It also gets the
            losses of each stage as JSON and, in ``forming``, some images of the first batch in several states.
        preview_seconds: Minimum time between two previews of a stage, in seconds.
        share: Share of the images that is synthesized.
    """

    def __init__(
        self,
        runner: Runner,
        generator: CalibrationSetGenerator,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        folder: Path,
        preview_seconds: float = 15.0,
        share: float = 1.0,
    ) -> None:
        self.logger = runner.logger
        self.backends = Backends(runner)
        self.calibration_set = calibration_set
        self.folder = folder
        self.preview_seconds = preview_seconds
        images = share * sum(calibration_set.shard_length(shard) for shard in shards)
        total = images * sum(stage.work for stage in generator.stages)
        self.progress = ConsoleProgress(runner.logger, 'synthesis', total, 'images', images)
        self._last = (-1, '', 0)
        self._previews = True
        self._losses: dict[str, list[float]] = {}
        self._forming: tuple[int, float] | None = None
        self._first_shard = shards[0] if shards else None
        self._steps: dict[str, int] = {}

    def __enter__(self) -> SynthesisProgress:
        self._previewed = time.perf_counter()
        self._write_preview(lambda: make_directory(self.folder))
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, trace)

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
        self.progress.advance(
            steps * len(step.images) * stage.work / stage.iterations,
            lambda: ' '.join(
                (
                    f'shard {shard} {stage.name} {step.iteration}/{step.iterations}',
                    *(f'{name}={value:.4g}' for name, value in step.losses.items()),
                )
            ),
        )
        self._add_losses(stage, step, steps)
        last = step.iteration == step.iterations
        self._keep_losses(shard, stage, step, same_batch, last)
        self._keep_state(shard, stage, step, last)
        now = time.perf_counter()
        if now - self._previewed < self.preview_seconds and not last:
            return
        self._previewed = now
        images = _pixels(step.images[:PREVIEW_IMAGES])
        name = f'shard_{shard:05d}_{stage.name}.png'
        labels, classes = step.labels[:PREVIEW_IMAGES], self.calibration_set.classes
        self._write_preview(lambda: save_gallery(self.folder / name, images, labels, classes))
        if last and shard == self._first_shard:
            self.backends.add_image(
                f'synthesis_{stage.name}', lambda: draw_gallery(images, labels, classes), step.iteration
            )

    def _add_losses(self, stage: Stage, step: StepProgress, steps: int) -> None:
        """Add the losses to the backends, in one curve over all batches of a stage."""
        position = self._steps[stage.name] = self._steps.get(stage.name, 0) + steps
        self.backends.add_scalars(
            {f'synthesis/{stage.name}_{name}': value for name, value in step.losses.items()}, position
        )

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
