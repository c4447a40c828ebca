# SPDX-License-Identifier: Apache-2.0
"""A whole calibration set: every shard sampled, relabeled at low resolution, synthesized at full, and written.

A shard is the unit of work and of loss. Its content depends on the seed and its index alone, so any number of
processes, in any order, interrupted or not, make the same set.
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

from mmzsq.errors import UserError, check_keys
from mmzsq.registry import LABEL_SAMPLERS, PRIORS, build_part
from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.label_samplers import fit_masks, rescale_labels
from mmzsq.synthesis.priors import select_priors
from mmzsq.synthesis.synthesizer import StepProgress, SynthesisResult, Synthesizer, Task

STAGE_KEYS = ('image_size', 'iterations', 'batch_size', 'lr', 'start')
STARTS = ('noise', 'previous')
SIZE_MULTIPLE = 32
"""Sizes that are shares of another are rounded to a multiple of this many pixels."""


@dataclass(frozen=True)
class Stage:
    """One pass over a shard.

    Attributes:
        name: ``'relabel'``, ``'refine'`` or ``'synthesize'``: labels are corrected in the first, fixed in the others.
        image_size: Height and width in pixels.
        iterations: Steps; 0 takes the images as they are: noise, if they start from it.
        batch_size: Images optimized together.
        lr: Learning rate; None: that of ``zsq.synthesis``.
        start: ``'noise'``, or ``'previous'``: the images of the stage before, resized, if there was one.
    """

    name: str
    image_size: tuple[int, int]
    iterations: int
    batch_size: int
    lr: float | None = None
    start: str = 'noise'

    @property
    def work(self) -> float:
        """Pixels times iterations that one image takes."""
        return float(self.image_size[0] * self.image_size[1] * self.iterations)

    @classmethod
    def from_cfg(
        cls, name: str, cfg: dict[str, Any], batch_size: int, full_size: tuple[int, int] | None = None
    ) -> Stage:
        """Read ``zsq.synthesis.relabel``, ``refine`` or ``synthesize``.

        Args:
            name: Key of the section.
            cfg: ``image_size`` (one number, (height, width), or a share of ``full_size`` below 1), ``iterations`` (0 is
                for ``synthesize`` and for ``relabel`` with ``start='previous'``), and perhaps the other attributes.
            batch_size: Where ``cfg`` names none.
            full_size: Height and width of the finished images; None if this is their stage.

        Raises:
            UserError: If a key is unknown or a number is not positive.
        """
        where = f'zsq.synthesis.{name}'
        check_keys(cfg, STAGE_KEYS, where)
        missing = [key for key in ('image_size', 'iterations') if key not in cfg]
        if missing:
            raise UserError(f'{where} lacks {" and ".join(missing)}')
        size = cfg['image_size']
        if isinstance(size, float) and 0 < size < 1 and full_size is not None:
            size = tuple(max(round(side * size / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE for side in full_size)
        size = tuple(size) if isinstance(size, Sequence) else (size, size)
        options = {key: cfg[key] for key in ('lr', 'start') if key in cfg}
        stage = cls(name, size, cfg['iterations'], cfg.get('batch_size') or batch_size, **options)
        if stage.start not in STARTS:
            raise UserError(f'{where}.start is one of {", ".join(map(repr, STARTS))}, not {stage.start!r}')
        untouched = name == 'synthesize' or (name, stage.start) == ('relabel', 'previous')
        numbers = [*size, stage.batch_size, *([] if untouched and stage.iterations == 0 else [stage.iterations])]
        if len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in numbers):
            raise UserError(
                f'{where} needs positive image_size (one number, (height, width) or, below 1, a share of the size of '
                "synthesize's images), iterations, batch_size"
            )
        return stage


def shard_seed(seed: int, shard: int, stage: int, batch: int) -> int:
    """A seed of its own for every batch, equal on every machine."""
    return int(np.random.SeedSequence([seed, shard, stage, batch]).generate_state(1, np.uint32)[0])


def _rounds(cfg: dict[str, Any] | Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [] if cfg is None else list(cfg) if isinstance(cfg, Sequence) else [cfg]


class CalibrationSetGenerator:
    """Makes shards of synthetic images with labels.

    Args:
        task: The frozen detector.
        synthesis: The section ``zsq.synthesis``: ``relabel`` and ``refine`` (each None, a dict, or a list of dicts for
            several rounds), ``synthesize``, ``priors``, ``require_feature_prior`` (True if absent), and arguments of
            :class:`Synthesizer`.
        label_sampler: The section ``zsq.label_sampler``.
        batch_size: Images a batch where a stage does not say.
        seed: Of the whole set.

    Attributes:
        priors_left_out: Those of ``priors`` that do not apply to the detector.
    """

    def __init__(
        self, task: Task, synthesis: dict[str, Any], label_sampler: dict[str, Any], batch_size: int, seed: int
    ) -> None:
        options = dict(synthesis)
        last = Stage.from_cfg('synthesize', options.pop('synthesize'), batch_size)
        self.stages = [
            Stage.from_cfg(name, stage, batch_size, last.image_size)
            for name in ('relabel', 'refine')
            for stage in _rounds(options.pop(name, None))
        ]
        self.stages.append(last)
        self.task = task
        self.seed = seed
        self.sampler = build_part(LABEL_SAMPLERS, label_sampler, 'zsq.label_sampler')
        if self.sampler.uses_detector_prior:
            self.sampler.set_label_prior(task.label_prior(), last.image_size)
        self.relabels_while_synthesizing = self.sampler.adaptive and self.stages[0].name != 'relabel'
        # What nothing remains of is not worth its time: neither corrected labels nor images to start from.
        while not self.sampler.adaptive and any(stage.start == 'noise' for stage in self.stages[1:]):
            self.stages = self.stages[1:]
        if self.stages[0].iterations == 0 and len(self.stages) > 1:
            raise UserError('zsq.synthesis.relabel begins with 0 iterations: there are no images yet to look at')
        priors = [build_part(PRIORS, prior, 'zsq.synthesis.priors') for prior in options.pop('priors')]
        selected = select_priors(priors, task.detector, options.pop('require_feature_prior', True))
        self.priors_left_out = [prior for prior in priors if prior not in selected]
        self.synthesizer = Synthesizer(task, selected, **options)

    @torch.no_grad()
    def check_sizes(self) -> None:
        """See that the detector takes images of every stage, before minutes go into those of the first.

        Raises:
            UserError: Names the stage whose images it does not take.
        """
        for size, name in {stage.image_size: stage.name for stage in self.stages}.items():
            try:
                self.task.predict(torch.zeros(1, 3, *size, device=self.task.device))
            except RuntimeError as error:
                if all(side % SIZE_MULTIPLE == 0 for side in size):
                    raise
                fitting = 'x'.join(str(-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in size)
                raise UserError(
                    f'{type(self.task.detector).__name__} takes no images of {size[0]}x{size[1]} pixels ({error}): set '
                    f'zsq.synthesis.{name}.image_size to multiples of {SIZE_MULTIPLE}, as {fitting}'
                ) from error

    @property
    def shard_size(self) -> int:
        """Images a shard: the largest batch of any stage."""
        return max(stage.batch_size for stage in self.stages)

    def make_shard(
        self, shard: int, count: int, on_progress: Callable[[Stage, StepProgress], None] | None = None
    ) -> tuple[np.ndarray, list[InstanceData], dict[str, Any]]:
        """Make one shard.

        Args:
            shard: Its index.
            count: Images in it.
            on_progress: Called about twenty times a batch.

        Returns:
            Images, uint8 RGB of shape (count, H, W, 3); their labels in pixels of these; and what was measured: per
            stage seconds, milliseconds per image and iteration, last losses, whether a CUDA graph ran, boxes changed.
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
            before = images if stage.start == 'previous' else None
            for batch, first in enumerate(range(0, count, stage.batch_size)):
                chosen = slice(first, first + stage.batch_size)
                results.append(
                    self.synthesizer.run(
                        labels[chosen],
                        size,
                        stage.iterations,
                        shard_seed(self.seed, shard, index + 1, batch),
                        start=None if before is None else before[chosen],
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
            'cuda_graph': all(result.captured for result in results),
            'added': sum(result.counts.get('added', 0) for result in results),
            'removed': sum(result.counts.get('removed', 0) for result in results),
            'adopted': sum(result.counts.get('adopted', 0) for result in results),
        }

    def generate(
        self,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        on_progress: Callable[[int, Stage, StepProgress], None] | None = None,
    ) -> None:
        """Make and write the given shards of ``calibration_set``, one after the other."""
        for shard in shards:
            images, labels, info = self.make_shard(
                shard,
                calibration_set.shard_length(shard),
                None if on_progress is None else lambda stage, progress: on_progress(shard, stage, progress),  # noqa: B023
            )
            calibration_set.write_shard(shard, images, labels, info)
