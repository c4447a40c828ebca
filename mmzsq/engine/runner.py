# SPDX-License-Identifier: Apache-2.0
"""Zero-shot quantization as a runner of MMEngine."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger, print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from mmengine.runner import runner as mmengine_runner
from torch import nn

from mmzsq.checkpoint import read_checkpoint
from mmzsq.class_names import check_built_dataset, check_data, check_dataset, choose_classes
from mmzsq.config import compose
from mmzsq.config.compose import class_names
from mmzsq.engine.backends import open_backends
from mmzsq.engine.bit_allocation import allocate_bits
from mmzsq.engine.config_text import formatted_once
from mmzsq.engine.console import shorten_console
from mmzsq.engine.evaluation import check_evaluation
from mmzsq.engine.optim_wrapper_constructor import muted
from mmzsq.engine.report import report_results, reported
from mmzsq.engine.safe_checkpoints import (
    POSITION_KEY,
    find_last_checkpoint,
    make_safe,
    notes_of_run,
    write_checkpoint,
)
from mmzsq.engine.train_loop import ResumableTrainLoop
from mmzsq.errors import UserError
from mmzsq.patching import patched
from mmzsq.qat import ZeroShotDetector
from mmzsq.registry import RUNNERS
from mmzsq.tasks.detection_task import num_classes
from mmzsq.version import __version__

FEWEST_BITS_UNTRAINED = 6
"""Bits from which post-training quantization alone keeps most of the accuracy (docs/choosing.md)."""


@RUNNERS.register_module()
class ZeroShotRunner(Runner):
    """Runner of a config with a ``zsq`` section.

    It composes the config, makes the calibration set, trains the student and reports results. No image of the user is
    read before training has ended. Annotations for the validation are checked before, if they are on this machine.

    Attributes:
        not_evaluated: After training, a message about an evaluation that failed; otherwise None.
        measured_layers: Number of layers that bit allocation measures, for rehearsals; None: all.
    """

    not_evaluated: str | None = None
    measured_layers: int | None = None

    @classmethod
    def from_cfg(cls, cfg: Config) -> ZeroShotRunner:
        """Build from a user's config, or from one that :func:`~mmzsq.config.compose` made.

        With ``resume``, training continues from ``load_from`` or, without one, from the last checkpoint in the
        work_dir. The teacher is then ``zsq.teacher``, or the one that the checkpoint names.

        Raises:
            UserError: If the config has a mistake, or there is no teacher.
        """
        cfg = copy.deepcopy(cfg)
        notes: list[str] = []
        if cfg.get('resume') and isinstance(cfg.get('zsq'), Mapping):
            cfg.load_from, teacher = resolve_resume(cfg, notes)
            cfg.resume = cfg.load_from is not None
            if cfg.zsq.get('teacher') is None:
                cfg.zsq.teacher = teacher
        cfg = compose(cfg)
        if cfg.optim_wrapper.type == 'mmengine.AmpOptimWrapper' and not torch.cuda.is_available():
            print_log('no GPU: zsq.train.amp is off', logger='current', level=logging.WARNING)
            cfg.optim_wrapper.type = 'mmengine.OptimWrapper'
            cfg.optim_wrapper.pop('dtype', None)
        # Images then move to the GPU while it still works on the batch before.
        cfg.train_dataloader.pin_memory = torch.cuda.is_available()
        with formatted_once():
            runner = super().from_cfg(cfg)
        for note in notes:
            runner.logger.warning(note)
        return runner

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build MMEngine's logger, and keep its dumps of environment, config and hooks from the console."""
        logger = super().build_logger(*args, **kwargs)
        path = shorten_console(logger)
        if path is not None:
            logger.info(f'mmzsq {__version__}, torch {torch.__version__}; environment and whole config: {path}')
        return logger

    @property
    def detector(self) -> ZeroShotDetector:
        """Teacher and student, without any wrapper for distributed training."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    def generate(self) -> None:
        """Make the calibration set, or what is missing of it, and nothing else.

        Raises:
            UserError: If ``load_from`` of a composed config was changed. It would have no effect.
        """
        composed_with = self.cfg.zsq.composed.get('load_from')
        teacher = self.detector.teacher_checkpoint
        if not self._resume and self._load_from not in (None, teacher, composed_with):
            raise UserError(
                f'load_from is {self._load_from}, but this config is already composed, with the teacher {teacher}: '
                'give load_from with the config that was composed'
            )
        if self.cfg.zsq.calibration_set.real is not None:
            self.logger.warning('zsq.calibration_set.real: this run learns from real images, for comparison only')
        self.call_hook('before_build')

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Register a hook as MMEngine does, and make a checkpoint hook safe against kills.

        Args:
            hook: The hook or its config.
            priority: Its priority; None: that of its class.
        """
        super().register_hook(hook, priority)
        for registered in self._hooks:
            if isinstance(registered, CheckpointHook):
                make_safe(registered)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint as MMEngine does, but atomically, and with the position of the training.

        All processes must call this together. The first one writes.
        """
        loop = self._train_loop
        self._position = loop.position() if isinstance(loop, ResumableTrainLoop) else None
        with patched(mmengine_runner, 'save_checkpoint', self._write_with_position):
            super().save_checkpoint(*args, **kwargs)

    def _write_with_position(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self._position is not None:
            checkpoint[POSITION_KEY] = self._position
        write_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint as MMEngine does, and keep the position of the training that it holds."""
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        self._loaded_position = checkpoint.get(POSITION_KEY)
        return checkpoint

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume as MMEngine does, and continue from the very position of the checkpoint."""
        super().resume(*args, **kwargs)
        loop = self._train_loop
        if isinstance(loop, ResumableTrainLoop):
            loop.resume(self._loaded_position)

    def load_or_resume(self) -> None:
        """Load or resume as MMEngine does, and record the iteration that training starts at."""
        super().load_or_resume()
        # The property would build the loop and the training data, which a test does not need.
        loop = self._train_loop
        self.first_iter = loop.iter if isinstance(loop, BaseLoop) else 0

    def train(self) -> nn.Module:
        """Make the calibration set if it is missing, train the student, and evaluate on the user's data, if any.

        A resumed run that is finished, results included, does nothing.
        """
        if self._is_finished():
            self.logger.info(f'the run in {self.work_dir} is finished: nothing is left to do, and no file changes')
            return self.model
        with open_backends(self), formatted_once():
            return self._train()

    def _train(self) -> nn.Module:
        val_loop: Any = self._val_loop
        self._val_loop: Any = None
        self._check_training_settings()
        self._warn_of_few_bits()
        self._check_classes()
        absent = check_evaluation(self)
        self.generate()
        if not self._resume:
            # The student starts from the teacher, which the model loads and checks by itself.
            self._load_from = None
        # MMEngine builds the optimizer before it initializes weights.
        self.detector.init_weights()
        self._allocate_bits()
        start = time.perf_counter()
        model = super().train()
        self.seconds = dict(train=time.perf_counter() - start)
        self.detector.end_training()
        self._val_loop = val_loop
        self.not_evaluated = report_results(self, self.detector, self.first_iter, self.seconds, absent)
        return model

    def _check_classes(self) -> None:
        """Compare class names of config, teacher and annotation files before any work.

        Raises:
            UserError: Names the first difference.
        """
        check_data(self.cfg, 'val')
        detector = self.detector
        teacher = detector.load_teacher()
        self._classes = choose_classes(
            class_names(self.cfg), detector.teacher_meta, num_classes(teacher), detector.teacher_checkpoint
        )
        if self.cfg.zsq.calibration_set.real is not None:
            check_dataset(self.cfg.zsq.calibration_set.real, 'zsq.calibration_set.real')

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """Build the loop as MMEngine does, and check the class names of its data.

        Args:
            loop: The loop or its config.

        Raises:
            UserError: If class names of config, data set and annotation files differ.
        """
        check_data(self.cfg, 'val')
        built = super().build_val_loop(loop)
        classes = getattr(self, '_classes', None) or class_names(self.cfg)
        check_built_dataset(built.dataloader.dataset, classes, 'val_dataloader.dataset')
        return built

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """Build the loop as MMEngine does, and check the class names of its data, see :meth:`build_val_loop`."""
        check_data(self.cfg, 'test')
        built = super().build_test_loop(loop)
        check_built_dataset(built.dataloader.dataset, class_names(self.cfg), 'test_dataloader.dataset')
        return built

    def _is_finished(self) -> bool:
        """Return whether this run resumes from its last checkpoint, and the results are there."""
        return self._resume and reported(self, str(self._load_from))

    def _check_training_settings(self) -> None:
        """Build what only building can check, before hours go into images: optimizer, schedules, transforms.

        Raises:
            UserError: Names the setting that cannot be built.
        """
        dataset = self._train_dataloader['dataset']
        real = self.cfg.zsq.calibration_set.real
        if real is not None:
            # Inside of the wrapper that seeds its transforms.
            dataset = dataset['dataset']
        for where, build in (
            ('zsq.train.optimizer', self._try_optimizer),
            ('the pipeline of the training data', lambda: Compose(copy.deepcopy(dataset.get('pipeline', [])))),
        ):
            try:
                build()
            except UserError:
                raise
            except Exception as error:
                raise UserError(f'{where} cannot be built: {_text(error)}') from error
        if real is not None:
            try:
                DATASETS.build(copy.deepcopy(dataset))
            except Exception as error:
                raise UserError(f'zsq.calibration_set.real cannot be built: {_text(error)}') from error

    def _warn_of_few_bits(self) -> None:
        """Warn if neither training nor reconstruction follows the first steps of few bits."""
        zsq = self.cfg.zsq
        bits = min(zsq.quantizer.w_bits, zsq.quantizer.a_bits)
        if zsq.train.max_epochs or zsq.reconstruction is not None or bits >= FEWEST_BITS_UNTRAINED:
            return
        self.logger.warning(
            f'nothing is trained (zsq.train.max_epochs=0), and {bits} bits without training can lose most of the '
            'accuracy. zsq.preset=reconstruct learns the rounding, in minutes on a CPU, and zsq.preset=default trains'
        )

    def _try_optimizer(self) -> None:
        """Build the optimizer, without its log lines: the weights that its rates may depend on are not loaded yet."""
        with muted('optimizer:'):
            self.build_optim_wrapper(copy.deepcopy(self.cfg.optim_wrapper))

    def _allocate_bits(self) -> None:
        """Give layers their bits; a resumed run has them already."""
        checkpoint = self._load_from if self._resume else None
        if checkpoint is None:
            allocate_bits(self, self.measured_layers)
        else:
            self.detector.load_bits_from(read_checkpoint(checkpoint))


def _text(error: Exception) -> str:
    """Return the message of an error; ``str`` of a KeyError is the repr of its message."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def resolve_resume(cfg: Config, notes: list[str]) -> tuple[str | None, str | None]:
    """Find the checkpoint that a config with ``resume`` continues from.

    Args:
        cfg: The config.
        notes: Gets messages for the log about files that cannot be used, and about the start.

    Returns:
        The checkpoint: ``load_from``, or the last whole one in the work_dir that a run of this project wrote, or None.
        And the teacher that the checkpoint names; None without a checkpoint.

    Raises:
        UserError: If ``load_from`` cannot be read or is not the checkpoint of a run, or nothing names a teacher.
    """
    given = cfg.get('load_from')
    if given:
        try:
            return given, notes_of_run(given)['teacher']
        except UserError as error:
            raise UserError(
                f'resume continues from load_from, but {error}. Name the full-precision detector by zsq.teacher, and '
                'leave load_from=None to continue from the last checkpoint in the work_dir'
            ) from error
    found = find_last_checkpoint(_checkpoint_folders(cfg), notes.append)
    if found is not None:
        path, of_run = found
        return path, of_run['teacher']
    if not cfg.zsq.get('teacher'):
        raise UserError(
            ''.join(f'{note}. ' for note in notes)
            + f'there is no run to resume in {cfg.work_dir}, and no teacher to start one from: set zsq.teacher'
        )
    notes.append(f'no run to resume in {cfg.work_dir}: starting from the teacher {cfg.zsq.teacher}')
    return None, None


def _checkpoint_folders(cfg: Config) -> list[Path]:
    """Return the folders with the checkpoints of a run: the work_dir, and that of the checkpoint hook."""
    work_dir = Path(cfg.work_dir)
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    out_dir = hook.get('out_dir')
    return [work_dir, *([Path(out_dir) / work_dir.name] if isinstance(out_dir, str | Path) else [])]
