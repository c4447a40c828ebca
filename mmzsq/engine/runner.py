# SPDX-License-Identifier: Apache-2.0
"""The thin layer that hangs zero-shot quantization on MMEngine's Runner."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, CheckpointLoader, Runner, find_latest_checkpoint
from torch import nn

from mmzsq.config import compose
from mmzsq.detectors import ZeroShotDetector
from mmzsq.engine.bit_allocation import allocate_bits
from mmzsq.engine.report import report_results
from mmzsq.errors import UserError
from mmzsq.registry import RUNNERS


@RUNNERS.register_module()
class ZeroShotRunner(Runner):
    """Runs a config with a ``zsq`` section: composes it, makes the calibration set, trains the student, reports.

    No data set of the user is opened before the student is finished: validation is built after training.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ZeroShotRunner:
        """Build from a config as a user writes it, or as :func:`~mmzsq.config.compose` made it."""
        cfg = copy.deepcopy(cfg)
        if cfg.get('resume') and 'zsq' in cfg and not cfg.zsq.get('composed'):
            resume_from = cfg.get('load_from')
            cfg.load_from = find_teacher(cfg)
            cfg = compose(cfg)
            cfg.load_from = resume_from
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
        report_results(self)
        return model

    def _allocate_bits(self) -> None:
        """Give layers their bits; a run that goes on has them already."""
        checkpoint = self._load_from or find_latest_checkpoint(self.work_dir) if self._resume else None
        if checkpoint is None:
            allocate_bits(self)
        else:
            self.detector.take_bits_of(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'))


def find_teacher(cfg: Config) -> str:
    """The teacher of a run that is resumed; ``load_from`` then names the checkpoint to go on from, or nothing.

    Raises:
        UserError: If neither the checkpoint nor the config file tells.
    """
    checkpoint = cfg.get('load_from') or find_latest_checkpoint(cfg.work_dir)
    if checkpoint is not None:
        meta: dict[str, Any] = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu').get('meta', {})
        if 'mmzsq' in meta:
            return meta['mmzsq']['teacher']
    if cfg.filename is not None and (teacher := Config.fromfile(cfg.filename).get('load_from')):
        return teacher
    raise UserError(
        f'cannot tell which teacher the run in {cfg.work_dir} started from: start it without --resume, with '
        'load_from set'
    )
