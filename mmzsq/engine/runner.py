# SPDX-License-Identifier: Apache-2.0
"""The thin layer that hangs zero-shot quantization on MMEngine's Runner."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, CheckpointLoader, Runner, find_latest_checkpoint
from torch import nn

from mmzsq.config import compose
from mmzsq.engine.bit_allocation import allocate_bits
from mmzsq.engine.report import report_results
from mmzsq.errors import UserError
from mmzsq.qat import ZeroShotDetector
from mmzsq.registry import RUNNERS


@RUNNERS.register_module()
class ZeroShotRunner(Runner):
    """Runs a config with a ``zsq`` section: composes it, makes the calibration set, trains the student, reports.

    No data set of the user is opened before the student is finished: validation is built after training.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ZeroShotRunner:
        """Build from a config as a user writes it, or as :func:`~mmzsq.config.compose.compose` made it."""
        cfg = copy.deepcopy(cfg)
        if cfg.get('resume') and 'zsq' in cfg:
            given = cfg.get('load_from')
            checkpoint, cfg.load_from = find_start(cfg)
            cfg.resume = checkpoint is not None
            cfg = compose(cfg)
            if cfg.resume:
                # The config that the run keeps is to go on from the last one, unless another was asked for.
                cfg.load_from = given if given == checkpoint else None
        cfg = compose(cfg)
        if cfg.optim_wrapper.type == 'AmpOptimWrapper' and not torch.cuda.is_available():
            print_log('no GPU: zsq.train.amp is off', logger='current', level=logging.WARNING)
            cfg.optim_wrapper.type = 'OptimWrapper'
            cfg.optim_wrapper.pop('dtype', None)
        # Images then go to the GPU while it still works on those before.
        cfg.train_dataloader.pin_memory = torch.cuda.is_available()
        return super().from_cfg(cfg)

    @property
    def detector(self) -> ZeroShotDetector:
        """Teacher and student, without any wrapper for distributed training."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    def generate(self) -> None:
        """Make the calibration set, or what is missing of it, and nothing else.

        Raises:
            UserError: If a composed config has another ``load_from`` than the teacher it was composed with.
        """
        teacher = self.detector.teacher_checkpoint
        if not self._resume and self._load_from not in (None, teacher):
            raise UserError(
                f'load_from is {self._load_from}, but this config is composed already, with the teacher {teacher}: '
                'give load_from with the config that was composed'
            )
        if self.cfg.zsq.calibration_set.real is not None:
            self.logger.warning('zsq.calibration_set.real: this run learns from real images, for comparison only')
        self.call_hook('before_build')

    def load_or_resume(self) -> None:
        """Load or resume as MMEngine does, and note where training starts."""
        super().load_or_resume()
        # Not the property, which would build the loop, and with it the training data, for a test.
        loop = self._train_loop
        self.first_iter = loop.iter if isinstance(loop, BaseLoop) else 0

    def train(self) -> nn.Module:
        """Make the calibration set if it is missing, train the student, evaluate on the user's data if there is any."""
        val_loop: Any = self._val_loop
        self._val_loop: Any = None
        self.generate()
        if not self._resume:
            # The student starts from the teacher, which the model loads by itself and checks.
            self._load_from = None
        # MMEngine builds the optimizer first, and rates may be relative to the weights.
        self.detector.init_weights()
        self._allocate_bits()
        start = time.perf_counter()
        model = super().train()
        self.seconds = dict(train=time.perf_counter() - start)
        self.detector.end_training()
        self._val_loop = val_loop
        report_results(self, self.detector, self.first_iter, self.seconds)
        return model

    def _allocate_bits(self) -> None:
        """Give layers their bits; a run that goes on has them already."""
        checkpoint = self._load_from or find_latest_checkpoint(self.work_dir) if self._resume else None
        if checkpoint is None:
            allocate_bits(self)
        else:
            self.detector.load_bits_from(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'))


def find_start(cfg: Config) -> tuple[str | None, str]:
    """Where a config with ``resume`` starts.

    ``load_from`` may be a checkpoint of a run, to go on from, or the teacher: of the run whose last checkpoint is in
    the work_dir, or of one that begins.

    Returns:
        The checkpoint to go on from, None if there is none, and the teacher.

    Raises:
        UserError: If a checkpoint cannot be read, or there is neither a run to go on from nor a teacher.
    """
    given = cfg.get('load_from')
    for checkpoint in (given, find_latest_checkpoint(cfg.work_dir)):
        if checkpoint and (written := _written_by_run(checkpoint)):
            return checkpoint, written['teacher']
    # MMDetection's tools/train.py empties load_from.
    teacher = given or (cfg.model.teacher if cfg.zsq.get('composed') else None) or _load_from_of_file(cfg)
    if not teacher:
        raise UserError(f'no run to go on from in {cfg.work_dir}, and no teacher to start one from: set load_from')
    print_log(f'no run to go on from in {cfg.work_dir}: starting from the teacher {teacher}', logger='current')
    return None, teacher


def last_checkpoint(work_dir: str) -> str | None:
    """The last checkpoint in ``work_dir``; None if there is none, or a float detector's training left it."""
    checkpoint = find_latest_checkpoint(work_dir)
    return checkpoint if checkpoint is not None and _written_by_run(checkpoint) else None


def _written_by_run(checkpoint: str) -> dict[str, Any]:
    """What our runs note in their checkpoints; empty for any other checkpoint."""
    try:
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(f'the checkpoint {checkpoint} cannot be read ({error})') from error
    return loaded.get('meta', {}).get('mmzsq', {})


def _load_from_of_file(cfg: Config) -> str | None:
    return None if cfg.filename is None else Config.fromfile(cfg.filename).get('load_from')
