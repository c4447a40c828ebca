# SPDX-License-Identifier: Apache-2.0
"""What a user sees while images are made: losses, images a second, time left, and the images themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mmengine.dist import get_rank
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator, Stage, StepProgress
from mmzsq.visualization import save_gallery

PREVIEW_IMAGES = 8


class SynthesisProgress:
    """A progress bar on a terminal, log lines elsewhere, and previews on disk.

    Work is counted in pixels times iterations: a step at 640 px counts for sixteen at 160 px.

    Args:
        runner: For its logger.
        generator: What makes the images.
        calibration_set: What they go into.
        shards: The shards that this process makes.
        folder: Where previews go, one PNG a shard and stage, renewed while it runs.
        log_seconds: Least time between two log lines, and between two previews of a stage.
    """

    def __init__(
        self,
        runner: Runner,
        generator: CalibrationSetGenerator,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        folder: Path,
        log_seconds: float = 15.0,
    ) -> None:
        self.logger = runner.logger
        self.calibration_set = calibration_set
        self.folder = folder
        self.log_seconds = log_seconds
        self.images = sum(calibration_set.shard_length(shard) for shard in shards)
        self.total = self.images * sum(stage.work for stage in generator.stages)
        self.done = 0.0
        self._last = (-1, '', 0)
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
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bar.start()
        self.task = self.bar.add_task('', total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, shard: int, stage: Stage, step: StepProgress) -> None:
        """Take note of where a batch stands."""
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
        if now - self.logged < self.log_seconds and not finished:
            return
        self.logged = now
        if self.bar.disable:
            left = (self.total - self.done) / rate
            self.logger.info(f'synthesis: {text}, {self.done / self.total:.0%}, {left:.0f} s left')
        images = (step.images[:PREVIEW_IMAGES].float().clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        name = f'shard_{shard:05d}_{stage.name}.png'
        save_gallery(self.folder / name, images, step.labels[:PREVIEW_IMAGES], self.calibration_set.classes)
