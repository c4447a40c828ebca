# SPDX-License-Identifier: Apache-2.0
"""Hook that generates the calibration set before training if it is missing or incomplete."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from mmengine.dist import barrier, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.class_names import check_same_classes, choose_classes
from mmzsq.config.plain_types import stable_text
from mmzsq.engine.backends import Backends
from mmzsq.engine.console import ConsoleProgress
from mmzsq.engine.progress import SynthesisProgress
from mmzsq.engine.shared_errors import on_main, raise_on_all_ranks
from mmzsq.errors import UserError
from mmzsq.pipelines import pipeline_of
from mmzsq.qat.teacher import digest
from mmzsq.registry import HOOKS
from mmzsq.synthesis import (
    CalibrationSet,
    CalibrationSetGenerator,
    MixedGenerator,
    NoFeaturePriorError,
    PictureLabels,
    ProceduralGenerator,
    no_labels,
)
from mmzsq.synthesis.health import measure, measured_images
from mmzsq.synthesis.set_metadata import read_intact_metadata
from mmzsq.synthesis.stage_sizes import choose_stages, full_size
from mmzsq.tasks import DetectionTask, build_detection_task
from mmzsq.tasks.detection_task import num_classes
from mmzsq.version import __version__
from mmzsq.visualization import draw_gallery, save_set_gallery
from mmzsq.visualization.gallery import load_labeled_images

GALLERY_IMAGES = 16
BARRIER_TIMEOUT = timedelta(days=30)
"""Time to wait for the slowest process. A shard may take longer than NCCL's timeout of ten minutes."""

MAX_ROUNDS = 3
"""Times that shards are made whose files were damaged in the meantime. More damage means a defective disk."""

DEFAULT_SCORE_THR = 0.3
"""Score from which predictions become labels of procedural pictures, if the label sampler has no ``score_thr``."""


@dataclass(frozen=True)
class Source:
    """What makes the images of a set, see :meth:`CalibrationSetHook.build_source`."""

    name: str
    """``'synthesized'``, ``'procedural'`` or ``'mixed'``."""
    generator: CalibrationSetGenerator | ProceduralGenerator | MixedGenerator
    task: DetectionTask | None
    """The detector; None if the images do not depend on it."""
    synthesized: CalibrationSetGenerator | None
    pictures: ProceduralGenerator | None
    synthesis: dict[str, Any]
    """The section with all sizes and batches."""
    choices: list[str]
    """What was chosen, for the log."""


@HOOKS.register_module()
class CalibrationSetHook(Hook):
    """Generates the calibration set: images in the style of DeepInversion, procedural pictures, or both.

    :class:`~mmzsq.engine.ZeroShotRunner` calls the hook at its own hook point ``before_build``, before it builds data
    loaders and the optimizer: they need the set. Shards are distributed over the ranks, and rank 0 merges them. A
    complete set with the same settings is reused.

    Args:
        root: Folder of the set.
        num_images: Number of images in the set.
        batch_size: Default batch size of the synthesis stages.
        seed: Random seed of the set.
        synthesis: The section ``zsq.synthesis``.
        label_sampler: The section ``zsq.label_sampler``.
        classes: Names of the categories. By default those in the teacher's checkpoint, or else ``class_0``,
            ``class_1`` and so on.
        source: ``'synthesized'``, ``'procedural'``, ``'mixed'`` or ``'auto'``, see
            :class:`~mmzsq.config.sections.CalibrationSetConfig`.
        label_pictures: Whether the teacher labels procedural pictures. By default they get no labels.

    Attributes:
        measures_health: Whether the health of the images is measured and stored with them. Images of a rehearsal
            mean nothing.
    """

    measures_health = True

    def __init__(
        self,
        root: str,
        num_images: int,
        batch_size: int,
        seed: int,
        synthesis: dict[str, Any],
        label_sampler: dict[str, Any],
        classes: Sequence[str] | None = None,
        source: str = 'synthesized',
        label_pictures: bool = False,
    ) -> None:
        self.root = Path(root)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.synthesis = synthesis
        self.label_sampler = label_sampler
        self.classes = classes
        self.source = source
        self.label_pictures = label_pictures

    def before_build(self, runner: Runner) -> None:
        """Generate the missing shards of the set.

        Args:
            runner: The :class:`~mmzsq.engine.ZeroShotRunner` with the teacher.

        Raises:
            UserError: If the set in the folder has other settings, the class names do not match the detector, or an
                image size does not suit it.
        """
        detector = runner.detector
        source = self.build_source(runner, detector.load_teacher())
        self._check_sampler(source, self.class_names(detector))
        if source.synthesized is not None and not self._has_set():
            # Before the set claims its folder, so that a corrected run can use it.
            source.synthesized.check_sizes()
        # Rank 0 may verify, wait or merge for longer than the usual timeout.
        group = dist.new_group(backend='gloo', timeout=BARRIER_TIMEOUT) if get_world_size() > 1 else None
        calibration_set = self._open(detector, source, group)
        if calibration_set.uses_real_labels:
            runner.logger.warning('the label sampler reads real labels: this calibration set is not zero-shot')

        def wait() -> None:
            runner.logger.warning(f'another run makes the calibration set in {self.root}: waiting until it ends')

        with ExitStack() as locked:
            if not on_main(lambda: calibration_set.is_complete, group):
                on_main(lambda: locked.enter_context(calibration_set.lock(wait)), group)
                # Another run may have completed the set while this one waited.
                if not on_main(lambda: calibration_set.is_complete, group):
                    self._complete(runner, source, calibration_set, group)
                    return
        on_main(calibration_set.verify, group)
        runner.logger.info(f'using the calibration set in {self.root}: {self.num_images} images')
        self._measure_health(runner, source.task, calibration_set)

    def _has_set(self) -> bool:
        """Return whether the folder holds a set, finished or not. Its sizes were checked when it began."""
        return any((self.root / name).exists() for name in ('manifest.json', 'shards/settings.json'))

    @staticmethod
    def _check_sampler(source: Source, classes: list[str]) -> None:
        """Compare the class names of a sampler of real labels with those of the detector."""
        if source.synthesized is None or not source.synthesized.sampler.uses_real_labels:
            return
        sampler = source.synthesized.sampler
        # Of the sampler itself, or of the one that it starts with.
        of_sampler = getattr(sampler, 'classes', None) or getattr(getattr(sampler, 'start', None), 'classes', None)
        check_same_classes(
            classes,
            of_sampler,
            'the detector',
            'the label sampler',
            f'Set zsq.label_sampler.classes to the names of the detector: {classes}',
        )

    def _open(self, detector: Any, source: Source, group: Any) -> CalibrationSet:
        """Open the set in all processes: first in rank 0, which may repair files."""
        opened: list[CalibrationSet] = []
        for first in (True, False):
            with raise_on_all_ranks(group):
                if first == (get_rank() == 0):
                    opened.append(
                        CalibrationSet.open(
                            self.root,
                            fingerprint=self._fingerprint(detector, source),
                            num_images=self.num_images,
                            shard_size=source.generator.shard_size,
                            classes=self.class_names(detector),
                            uses_real_labels=source.synthesized is not None
                            and source.synthesized.sampler.uses_real_labels,
                            versions=dict(
                                mmzsq=__version__, torch=torch.__version__, torchvision=torchvision.__version__
                            ),
                        )
                    )
        return opened[0]

    def _complete(self, runner: Runner, source: Source, calibration_set: CalibrationSet, group: Any) -> None:
        """Make the missing shards, and again those whose files were damaged in the meantime, and merge them."""
        # Rank 0 lists the missing shards before any rank writes one, so that all ranks share the same list.
        missing = on_main(calibration_set.missing_shards, group)
        runner.logger.info(
            f'generating the calibration set in {self.root}: {self.num_images} images, {len(missing)} of '
            f'{calibration_set.num_shards} shards missing'
        )
        for choice in source.choices:
            runner.logger.info(choice)
        for _ in range(MAX_ROUNDS):
            if not missing:
                break
            with raise_on_all_ranks(group):
                self._make_shards(runner, source, calibration_set, missing[get_rank() :: get_world_size()])
            missing = on_main(calibration_set.missing_shards, group)
        on_main(lambda: calibration_set.merge(runner.detector.teacher_sha256), group)
        on_main(lambda: self._save_gallery(runner), group)
        self._measure_health(runner, source.task, calibration_set)
        barrier(group)
        runner.logger.info(f'calibration set: {json.dumps(calibration_set.statistics())}')

    def _make_shards(
        self, runner: Runner, source: Source, calibration_set: CalibrationSet, shards: Sequence[int]
    ) -> None:
        generator = source.generator
        if isinstance(generator, ProceduralGenerator):
            count = sum(map(calibration_set.shard_length, shards))
            with ConsoleProgress(runner.logger, 'procedural pictures', count, 'pictures') as progress:
                generator.generate(
                    calibration_set, shards, lambda shard: progress.advance(calibration_set.shard_length(shard))
                )
        else:
            self._synthesize(runner, source, generator, calibration_set, shards)

    def _save_gallery(self, runner: Runner) -> None:
        """Write the gallery, or warn: a run does not need it."""
        shown = range(min(GALLERY_IMAGES, self.num_images))
        try:
            save_set_gallery(self.root / 'gallery.png', self.root, shown)
        except UserError as error:
            runner.logger.warning(f'no gallery: {error}')
        backends = Backends(runner)
        backends.add_image('calibration_set', lambda: draw_gallery(*load_labeled_images(self.root, shown)), 0)

    def build_source(self, runner: Runner, teacher: nn.Module) -> Source:
        """Build what makes the images. Pictures alone need neither priors, a label sampler nor a detection loss.

        Args:
            runner: The runner, whose config has the test pipeline.
            teacher: The frozen detector.

        Raises:
            UserError: If a setting does not suit the detector.
        """
        name = self.source
        task = None if name == 'procedural' and not self.label_pictures else build_detection_task(teacher)
        synthesized = None
        synthesis, choices = self.synthesis, list[str]()
        if task is not None and name != 'procedural':
            try:
                synthesis, choices = self.choose_stages(runner, task)
                synthesized = CalibrationSetGenerator(task, synthesis, self.label_sampler, self.batch_size, self.seed)
            except NoFeaturePriorError as error:
                if name != 'auto':
                    raise
                runner.logger.warning(
                    f'the calibration set consists of procedural pictures, not of synthesized images, since {error}'
                )
        if synthesized is not None and name != 'mixed':
            return Source('synthesized', synthesized, task, synthesized, None, synthesis, choices)
        label: Callable[[np.ndarray], list[InstanceData]] = no_labels
        if task is not None and self.label_pictures:
            label = PictureLabels(task, self._score_thr)
        size, reason = full_size(synthesis, teacher, pipeline_of(runner.cfg))
        pictures = ProceduralGenerator(size, self.seed, label)
        if synthesized is None:
            choices = [f'procedural pictures of {size[0]}x{size[1]} pixels ({reason})']
            labeler = task if self.label_pictures else None
            return Source('procedural', pictures, labeler, None, pictures, synthesis, choices)
        return Source('mixed', MixedGenerator(synthesized, pictures), task, synthesized, pictures, synthesis, choices)

    def _synthesize(
        self,
        runner: Runner,
        source: Source,
        generator: CalibrationSetGenerator | MixedGenerator,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
    ) -> None:
        assert source.synthesized is not None and source.task is not None
        if source.task.note is not None:
            runner.logger.warning(source.task.note)
        synthesizer = source.synthesized.synthesizer
        left_out = ', '.join(type(prior).__name__ for prior in source.synthesized.priors_left_out)
        runner.logger.info(
            f'detection loss: {synthesizer.describe_detection()}; '
            f'priors: {", ".join(type(prior).__name__ for prior in synthesizer.priors) or "none"}'
            f'{f" (left out, since they do not apply to this detector: {left_out})" if left_out else ""}'
        )
        share = 0.5 if source.name == 'mixed' else 1.0
        previews = self.root / 'previews'
        with SynthesisProgress(runner, source.synthesized, calibration_set, shards, previews, share=share) as progress:
            generator.generate(calibration_set, shards, progress.update)
        if synthesizer.eager_reason is not None:
            runner.logger.warning(
                f'synthesis ran without a CUDA graph: the detection loss synchronizes with the device '
                f'({synthesizer.eager_reason})'
            )

    def choose_stages(self, runner: Runner, task: DetectionTask) -> tuple[dict[str, Any], list[str]]:
        """Choose the sizes and batches that the config leaves open, on rank 0 for all ranks.

        The choices of a set in the folder are kept.

        Args:
            runner: The runner, whose config has the test pipeline.
            task: The teacher.

        Returns:
            See :func:`~mmzsq.synthesis.stage_sizes.choose_stages`.
        """

        def choose() -> tuple[dict[str, Any], list[str]]:
            known = read_intact_metadata(self.root)
            return choose_stages(
                task,
                self.synthesis,
                self.label_sampler,
                self.batch_size,
                self.seed,
                pipeline_of(runner.cfg),
                None if known is None else known['fingerprint'].get('synthesis'),
            )

        return on_main(choose)

    def _measure_health(self, runner: Runner, task: DetectionTask | None, calibration_set: CalibrationSet) -> None:
        """Log the health of a complete set and store it in the manifest, on rank 0; never fails a run.

        Pictures that do not depend on the detector are not measured.
        """
        if task is None or not self.measures_health or get_rank() != 0 or 'health' in (calibration_set.manifest or {}):
            return
        try:
            images, labels, _ = load_labeled_images(self.root, measured_images(self.num_images))
            health = measure(task, np.stack(images), labels)
        except Exception as error:
            runner.logger.warning(f'the health of the images is not measured: {type(error).__name__}: {error}')
            return
        runner.logger.info(health.summary())
        for warning in health.warnings:
            runner.logger.warning(f'image health: {warning}')
        try:
            calibration_set.record_health(health.to_dict())
        except UserError as error:
            runner.logger.warning(f'the health of the images is not kept: {error}')

    def _fingerprint(self, detector: Any, source: Source) -> dict[str, Any]:
        """Return everything that determines the content of the set."""
        pictures = {} if source.pictures is None else dict(source.pictures.fingerprint, source=source.name)
        if source.pictures is not None and self.label_pictures:
            pictures['score_thr'] = self._score_thr
        if source.task is None:
            # The pictures do not depend on the detector.
            return pictures
        config = json.dumps(detector.detector_cfg, sort_keys=True, default=stable_text)
        pictures.update(
            teacher=digest(source.task.detector), detector_config=hashlib.sha256(config.encode()).hexdigest()
        )
        if source.synthesized is None:
            return pictures
        return dict(
            pictures,
            seed=self.seed,
            synthesis=source.synthesis,
            label_sampler=self.label_sampler,
            batch_size=self.batch_size,
        )

    @property
    def _score_thr(self) -> float:
        return float(self.label_sampler.get('score_thr', DEFAULT_SCORE_THR))

    def class_names(self, detector: Any) -> list[str]:
        """Return the names of the categories.

        Args:
            detector: The :class:`~mmzsq.qat.ZeroShotDetector` with the teacher.

        Raises:
            UserError: If the config names another number of classes than the detector has, or others than the teacher.
        """
        count = num_classes(detector.load_teacher())
        if self.classes is not None and len(self.classes) != count:
            first = f'{", ".join(self.classes[:3])}{", ..." if len(self.classes) > 3 else ""}'
            raise UserError(
                f'the data sets of this config have {len(self.classes)} classes ({first}), but the detector has '
                f'{count}: set metainfo=dict(classes=[...]) of these data sets to the names of the detector'
            )
        known = choose_classes(self.classes, detector.teacher_meta, count, detector.teacher_checkpoint)
        if known is not None:
            return known
        print_log(
            f'neither the config nor the teacher names the {count} classes: they are called class_0, class_1, ... To '
            'name them, set metainfo=dict(classes=[...]) of the data sets in the config, or '
            'meta.dataset_meta.classes of the checkpoint',
            logger='current',
            level=logging.WARNING,
        )
        return [f'class_{index}' for index in range(count)]
