# SPDX-License-Identifier: Apache-2.0
"""Generation of a calibration set, shard by shard: sample labels, relabel at low resolution, synthesize, write to disk.

A shard is generated as a whole, and an interruption loses at most one. Its content depends only on the seed and its
index, so any number of processes, in any order, generate the same set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS, PRIORS, build_part
from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.config import NO_ITERATIONS, StageConfig, iterations_allowed
from mmzsq.synthesis.default_sizes import SIZE_MULTIPLE, complete_sizes
from mmzsq.synthesis.label_samplers import fit_masks, rescale_labels
from mmzsq.synthesis.priors import select_priors
from mmzsq.synthesis.procedural import draw_pictures
from mmzsq.synthesis.synthesizer import StepProgress, SynthesisResult, SynthesisTask, Synthesizer


@dataclass(frozen=True)
class Stage:
    """One pass over a shard.

    Attributes:
        name: ``'relabel'``, ``'refine'`` or ``'synthesize'``. Labels change only in ``'relabel'``, or in all stages if
            there is no ``'relabel'``.
        image_size: Height and width in pixels.
        iterations: Number of steps; 0 leaves the initial images unchanged.
        batch_size: Number of images optimized together.
        lr: Learning rate; None: that of ``zsq.synthesis``.
        start: Initial images: ``'noise'``, ``'previous'`` for the resized images of the previous stage, if any, or
            ``'procedural'`` for pictures of :mod:`mmzsq.synthesis.procedural`.
    """

    name: str
    image_size: tuple[int, int]
    iterations: int
    batch_size: int
    lr: float | None = None
    start: str = 'noise'

    @property
    def work(self) -> float:
        """Cost of one image: pixels times iterations."""
        return float(self.image_size[0] * self.image_size[1] * self.iterations)

    @classmethod
    def from_config(cls, name: str, cfg: Any, batch_size: int, full_size: tuple[int, int] | None = None) -> Stage:
        """Parse ``zsq.synthesis.relabel``, ``refine`` or ``synthesize``.

        Args:
            name: Key of the section.
            cfg: The section, see :class:`~mmzsq.synthesis.config.StageConfig`.
            batch_size: Default batch size.
            full_size: Height and width of the finished images; None for ``synthesize``, which defines it.

        Raises:
            UserError: If a key is unknown or missing, or a value is not allowed.
        """
        where = f'zsq.synthesis.{name}'
        config = StageConfig.parse(cfg, where)
        if not iterations_allowed(name, config):
            raise UserError(f'{where}.{NO_ITERATIONS}')
        size = config.image_size
        if size is None:
            raise UserError(f'{where}.image_size is None: complete it by mmzsq.synthesis.complete_sizes.')
        if isinstance(size, float):
            if full_size is None:
                raise UserError(f'{where}.image_size is {size}, but must be in pixels: other stages refer to it.')
            height, width = (max(round(side * size / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE for side in full_size)
        else:
            height, width = (size, size) if isinstance(size, int) else size
        return cls(name, (height, width), config.iterations, config.batch_size or batch_size, config.lr, config.start)


def shard_seed(seed: int, shard: int, stage: int, batch: int) -> int:
    """Derive the seed of a batch, the same on every machine.

    Args:
        seed: Seed of the set.
        shard: Index of the shard.
        stage: Index of the stage, from 1; 0 for the labels.
        batch: Index of the batch in the shard.
    """
    return int(np.random.SeedSequence([seed, shard, stage, batch]).generate_state(1, np.uint32)[0])


def to_images(pictures: np.ndarray, task: SynthesisTask) -> Tensor:
    """Convert pictures to images for a detector.

    Args:
        pictures: (n, H, W, 3), uint8, RGB.
        task: The detector.

    Returns:
        (n, 3, H, W), float32, in [0, 1], in the detector's channel order and on its device.
    """
    images = torch.from_numpy(pictures).to(task.device).permute(0, 3, 1, 2).float() / 255
    return (images if task.channel_order == 'rgb' else images.flip(1)).contiguous()


def _as_list(cfg: dict[str, Any] | Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [] if cfg is None else list(cfg) if isinstance(cfg, Sequence) else [cfg]


class CalibrationSetGenerator:
    """Generates shards of labeled synthetic images.

    Args:
        task: The frozen detector.
        synthesis: The section ``zsq.synthesis``: ``relabel`` and ``refine`` (each None, a dict, or a list of dicts for
            several rounds), ``synthesize``, ``priors``, ``require_feature_prior`` (True by default), and arguments of
            :class:`Synthesizer`. Sizes of None are completed by
            :func:`~mmzsq.synthesis.default_sizes.complete_sizes`, whatever the detector takes.
        label_sampler: The section ``zsq.label_sampler``.
        batch_size: Default batch size of a stage.
        seed: Seed of the set.

    Attributes:
        stages: The stages of each shard, in order.
        sampler: The label sampler.
        synthesizer: Optimizes the batches.
        priors_left_out: Configured priors that do not apply to the detector.

    Raises:
        UserError: If a section is invalid.
    """

    def __init__(
        self, task: SynthesisTask, synthesis: dict[str, Any], label_sampler: dict[str, Any], batch_size: int, seed: int
    ) -> None:
        options = complete_sizes(synthesis)
        options.pop('fit_batches', None)
        last = Stage.from_config('synthesize', options.pop('synthesize'), batch_size)
        self.stages = [
            Stage.from_config(name, stage, batch_size, last.image_size)
            for name in ('relabel', 'refine')
            for stage in _as_list(options.pop(name, None))
        ]
        self.stages.append(last)
        self.task = task
        self.seed = seed
        self.sampler = build_part(LABEL_SAMPLERS, label_sampler, 'zsq.label_sampler')
        if self.sampler.uses_detector_prior:
            self.sampler.set_label_prior(task.label_prior(), last.image_size)
        self.relabels_while_synthesizing = self.sampler.adaptive and self.stages[0].name != 'relabel'
        # Skip stages without an effect: no labels are corrected, and a later stage starts without these images.
        while not self.sampler.adaptive and any(stage.start != 'previous' for stage in self.stages[1:]):
            self.stages = self.stages[1:]
        if self.stages[0].iterations == 0 and len(self.stages) > 1:
            raise UserError(
                'the first round of zsq.synthesis.relabel has 0 iterations, but there are no images yet to predict on'
            )
        priors = [
            build_part(PRIORS, prior, f'zsq.synthesis.priors[{index}]')
            for index, prior in enumerate(options.pop('priors'))
        ]
        selected = select_priors(priors, task.detector, options.pop('require_feature_prior', True))
        self.priors_left_out = [prior for prior in priors if prior not in selected]
        self.synthesizer = Synthesizer(task, selected, **options)

    @torch.no_grad()
    def check_sizes(self) -> None:
        """Check that the detector accepts the image size of every stage, before time is spent on the first one.

        Raises:
            UserError: If it does not; the message names the stage and a valid size.
        """
        for size, name in {stage.image_size: stage.name for stage in self.stages}.items():
            try:
                self.task.predict(torch.zeros(1, 3, *size, device=self.task.device))
            except RuntimeError as error:
                if all(side % SIZE_MULTIPLE == 0 for side in size):
                    raise
                fitting = 'x'.join(str(-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in size)
                detector_name = type(self.task.detector).__name__
                raise UserError(
                    f'{detector_name} does not accept images of {size[0]}x{size[1]} pixels ({error}): '
                    f'set zsq.synthesis.{name}.image_size to multiples of {SIZE_MULTIPLE}, for example {fitting}'
                ) from error

    @property
    def shard_size(self) -> int:
        """Number of images in a shard: the largest batch size of any stage."""
        return max(stage.batch_size for stage in self.stages)

    def make_shard(
        self, shard: int, count: int, on_progress: Callable[[Stage, StepProgress], None] | None = None
    ) -> tuple[np.ndarray, list[InstanceData], dict[str, Any]]:
        """Generate one shard.

        Args:
            shard: Index of the shard.
            count: Number of images.
            on_progress: Called about twenty times for each batch.

        Returns:
            The images, uint8 RGB of shape (count, H, W, 3); their labels in pixels of these images; and for each stage
            the measurements: seconds, milliseconds per image and iteration, last losses, whether a CUDA graph ran, and
            the numbers of boxes changed.
        """
        generator = torch.Generator().manual_seed(shard_seed(self.seed, shard, 0, 0))
        size = self.stages[0].image_size
        labels = self.sampler.sample(count, size, self.task.num_classes, generator)
        labels = fit_masks(labels, size, self.task.needs_masks)
        info: dict[str, Any] = {}
        images: Tensor | None = None
        for index, stage in enumerate(self.stages):
            labels = rescale_labels(labels, size, stage.image_size)
            size = stage.image_size
            results = []
            start = time.perf_counter()
            initial = self._initial_images(stage, shard, index + 1, count, images)
            for batch, first in enumerate(range(0, count, stage.batch_size)):
                chosen = slice(first, first + stage.batch_size)
                results.append(
                    self.synthesizer.run(
                        labels[chosen],
                        size,
                        stage.iterations,
                        shard_seed(self.seed, shard, index + 1, batch),
                        start=None if initial is None else initial[chosen],
                        lr=stage.lr,
                        sampler=self.sampler if stage.name == 'relabel' or self.relabels_while_synthesizing else None,
                        on_progress=None if on_progress is None else lambda progress: on_progress(stage, progress),  # noqa: B023
                    )
                )
            labels = [instances for result in results for instances in result.labels]
            images = torch.cat([result.images for result in results])
            info[stage.name if stage.name not in info else f'{stage.name}_{index + 1}'] = self._measure(
                stage, results, count, time.perf_counter() - start
            )
        assert images is not None
        return self._to_rgb(images), labels, info

    def _initial_images(
        self, stage: Stage, shard: int, index: int, count: int, previous: Tensor | None
    ) -> Tensor | None:
        """Return images that a stage starts from, in [0, 1]; None: noise."""
        if stage.start == 'procedural':
            seed = shard_seed(self.seed, shard, index, 0)
            seeds = [np.random.SeedSequence([seed, place]) for place in range(count)]
            return to_images(np.stack([*draw_pictures(seeds, *stage.image_size)]), self.task)
        return previous if stage.start == 'previous' else None

    def _to_rgb(self, images: Tensor) -> np.ndarray:
        images = images if self.task.channel_order == 'rgb' else images.flip(1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @staticmethod
    def _measure(stage: Stage, results: list[SynthesisResult], count: int, seconds: float) -> dict[str, Any]:
        steps = count * stage.iterations
        return {
            'image_size': list(stage.image_size),
            'iterations': stage.iterations,
            'batch_size': stage.batch_size,
            'seconds': round(seconds, 3),
            'ms_per_image_iteration': round(1000 * seconds / steps, 4) if steps else 0.0,
            'losses': {name: round(value, 5) for name, value in results[-1].losses.items()},
            'factors': {name: float(f'{value:.4g}') for name, value in results[-1].factors.items()},
            'cuda_graph': all(result.captured for result in results),
            'added': sum(result.counts.get('added', 0) for result in results),
            'removed': sum(result.counts.get('removed', 0) for result in results),
        }

    def generate(
        self,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        on_progress: Callable[[int, Stage, StepProgress], None] | None = None,
    ) -> None:
        """Generate shards and write them to a calibration set.

        Args:
            calibration_set: The set, open for writing.
            shards: Indices of the shards.
            on_progress: Called with the index of the shard, the stage and its progress, about twenty times for each
                batch.

        Raises:
            UserError: If the loss diverges, or the disk is full or not writable.
        """
        for shard in shards:
            images, labels, info = self.make_shard(
                shard,
                calibration_set.shard_length(shard),
                None if on_progress is None else lambda stage, progress: on_progress(shard, stage, progress),  # noqa: B023
            )
            calibration_set.write_shard(shard, images, labels, info)
