# SPDX-License-Identifier: Apache-2.0
"""Makes the calibration set before training when it is missing or unfinished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from mmengine.dist import barrier, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmzsq.engine.progress import SynthesisProgress
from mmzsq.errors import UserError
from mmzsq.qat.teacher import digest
from mmzsq.registry import HOOKS
from mmzsq.synthesis import CalibrationSet, CalibrationSetGenerator
from mmzsq.tasks import DetectionTask, build_detection_task
from mmzsq.version import __version__
from mmzsq.visualization import save_set_gallery

GALLERY_IMAGES = 16
LONGEST_WAIT = timedelta(days=30)
"""For the slowest process; a shard may take longer than the ten minutes after which NCCL gives up."""


@HOOKS.register_module()
class CalibrationSetHook(Hook):
    """The DeepInversion-style generator, run by :class:`~mmzsq.engine.ZeroShotRunner` before anything is built.

    Ranks take shards in turn and rank 0 merges; a set that is complete and fits is used as it is.

    Args:
        root: Folder of the set.
        num_images: Images in it.
        batch_size: Images a batch where a stage does not say.
        seed: Of the set.
        synthesis: The section ``zsq.synthesis``.
        label_sampler: The section ``zsq.label_sampler``.
        classes: Names of the categories; None: those of the teacher's checkpoint, else ``class_0`` and so on.
    """

    def __init__(
        self,
        root: str,
        num_images: int,
        batch_size: int,
        seed: int,
        synthesis: dict[str, Any],
        label_sampler: dict[str, Any],
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(root)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.synthesis = synthesis
        self.label_sampler = label_sampler
        self.classes = classes

    def before_build(self, runner: Runner) -> None:
        """Make what is missing of the set."""
        detector = runner.detector
        task = build_detection_task(detector.load_teacher())
        generator = CalibrationSetGenerator(task, self.synthesis, self.label_sampler, self.batch_size, self.seed)
        calibration_set = CalibrationSet.open(
            self.root,
            fingerprint=self._fingerprint(detector, task),
            num_images=self.num_images,
            shard_size=generator.shard_size,
            classes=self._class_names(detector, task),
            uses_real_labels=generator.sampler.uses_real_labels,
            versions=dict(mmzsq=__version__, torch=torch.__version__, torchvision=torchvision.__version__),
        )
        if generator.sampler.uses_real_labels:
            runner.logger.warning('the label sampler reads real labels: this calibration set is not zero-shot')
        if calibration_set.is_complete:
            if get_rank() == 0:
                calibration_set.verify()
            runner.logger.info(f'using the calibration set in {self.root}: {self.num_images} images')
            return
        generator.check_sizes()
        missing = calibration_set.missing_shards()
        # All ranks list before any writes: they share out the same shards.
        group = dist.new_group(backend='gloo', timeout=LONGEST_WAIT) if get_world_size() > 1 else None
        barrier(group)
        mine = missing[get_rank() :: get_world_size()]
        runner.logger.info(
            f'making the calibration set in {self.root}: {self.num_images} images, {len(missing)} of '
            f'{calibration_set.num_shards} shards to go'
        )
        if task.note is not None:
            runner.logger.warning(task.note)
        synthesizer = generator.synthesizer
        left_out = ', '.join(type(prior).__name__ for prior in generator.priors_left_out)
        runner.logger.info(
            f'detection loss: {synthesizer.detection_weight:g} x the {synthesizer.detection_reduction} over the images '
            f'of a batch; priors: {", ".join(type(prior).__name__ for prior in synthesizer.priors) or "none"}'
            f'{f" (left out, since they do not apply to this detector: {left_out})" if left_out else ""}'
        )
        with SynthesisProgress(runner, generator, calibration_set, mine, self.root / 'previews') as progress:
            generator.generate(calibration_set, mine, progress.update)
        if synthesizer.eager_reason is not None:
            runner.logger.warning(
                f'synthesis ran without a CUDA graph: the detection loss waits for the device '
                f'({synthesizer.eager_reason})'
            )
        barrier(group)
        if get_rank() == 0:
            calibration_set.merge()
            save_set_gallery(self.root / 'gallery.png', self.root, range(min(GALLERY_IMAGES, self.num_images)))
        barrier(group)
        runner.logger.info(f'calibration set: {json.dumps(calibration_set.statistics())}')

    def _fingerprint(self, detector: Any, task: DetectionTask) -> dict[str, Any]:
        """What the set depends on: another teacher or other settings make another set."""
        config = json.dumps(detector.detector_cfg, sort_keys=True, default=str)
        return dict(
            teacher=digest(task.detector),
            detector_config=hashlib.sha256(config.encode()).hexdigest(),
            seed=self.seed,
            synthesis=self.synthesis,
            label_sampler=self.label_sampler,
            batch_size=self.batch_size,
        )

    def _class_names(self, detector: Any, task: DetectionTask) -> list[str]:
        if self.classes is not None and len(self.classes) != task.num_classes:
            first = f'{", ".join(self.classes[:3])}{", ..." if len(self.classes) > 3 else ""}'
            raise UserError(
                f'the data sets of this config have {len(self.classes)} classes ({first}), but the detector tells '
                f'{task.num_classes} apart: name its own, val_dataloader.dataset.metainfo=dict(classes=[...])'
            )
        known = self.classes or detector.teacher_meta.get('dataset_meta', {}).get('classes')
        if known is not None and len(known) == task.num_classes:
            return list(known)
        return [f'class_{index}' for index in range(task.num_classes)]
