# SPDX-License-Identifier: Apache-2.0
"""Gives every quantizer its first step from the calibration set."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from textwrap import shorten

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmzsq.atomic_files import delete_unfinished, to_json, write_atomically
from mmzsq.errors import UserError
from mmzsq.qat.zero_shot_detector import trained_quantization
from mmzsq.quantization import quantizers
from mmzsq.quantization.config import QuantizationConfig
from mmzsq.registry import HOOKS

PTQ_FILE = 'ptq.pth'
"""The student right after initialization, in the work_dir: post-training quantization, the baseline of a run."""

REPORT_FILE = 'quantization_report.json'
"""Every layer, in the work_dir: bits, scheme, first steps, or why it stayed float."""


SHOWN = 100
"""Characters of a setting that a message shows: bits of each layer fill a page."""


@HOOKS.register_module()
class QuantizerInitHook(Hook):
    """Initializes the steps on batches of the calibration set; a resumed run finds them initialized.

    Args:
        num_batches: Training batches (of every rank) that the statistics are taken from.
    """

    # After the model is loaded, before anything trains or copies it.
    priority = 'VERY_HIGH'

    def __init__(self, num_batches: int = 4) -> None:
        self.num_batches = num_batches

    def before_train(self, runner: Runner) -> None:
        """Initialize what is not."""
        detector = runner.detector
        if not _uninitialized(detector.student):
            return
        detector.initialize_quantizers(itertools.islice(runner.train_dataloader, self.num_batches))
        runner.logger.info(f'quantizers initialized on {self.num_batches} batches\n{detector.report.to_table()}')
        self._save(runner)

    @master_only
    def _save(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        checkpoint = dict(state_dict=runner.detector.state_dict())
        # Its bits may be other than the config's.
        self.before_save_checkpoint(runner, checkpoint)
        delete_unfinished(folder, {PTQ_FILE, REPORT_FILE})
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(folder / PTQ_FILE, content.getvalue())
        write_atomically(folder / REPORT_FILE, to_json(runner.detector.report.to_dict(), indent=2))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down what a resumed run and a reader of the file need to know."""
        checkpoint.setdefault('meta', {})['mmzsq'] = dict(
            teacher=runner.detector.teacher_checkpoint,
            # Plain data alone: the checkpoint is to be read with weights_only=True.
            quantizer=json.loads(json.dumps(runner.detector.quantizer_cfg)),
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse a checkpoint of other integers than the config has, or of other layers: it would load all the same.

        Raises:
            UserError: Names the settings that differ, or a layer.
        """
        trained = trained_quantization(checkpoint)
        if trained is not None:
            self._check_settings(runner, checkpoint, trained)
        _check_factors(runner.detector, checkpoint.get('state_dict', {}))

    def _check_settings(self, runner: Runner, checkpoint: dict, trained: QuantizationConfig) -> None:
        # In training an optimizer holds the steps, and the bits are those of the checkpoint already.
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            runner.detector.load_bits_from(checkpoint)
        before, now = trained.integers(), runner.detector.quantization_config.integers()
        differing = [
            f'{key} {shorten(repr(before[key]), SHOWN)}, not {shorten(repr(now[key]), SHOWN)}'
            for key in before
            if before[key] != now[key]
        ]
        if differing:
            raise UserError(
                f'the checkpoint was trained with other settings of zsq.quantizer: {"; ".join(differing)}. Give the '
                'config that it was trained with'
            )

    def before_test(self, runner: Runner) -> None:
        """Refuse to test a float checkpoint as if it were quantized."""
        names = _uninitialized(runner.detector.student)
        if names:
            raise UserError(
                f'this checkpoint holds no quantizer steps ({len(names)} are missing, such as {names[0]}): it is a '
                "float checkpoint. Test it with the detector's own config, or give the checkpoint that training wrote"
            )

    def before_val(self, runner: Runner) -> None:
        """As before a test."""
        self.before_test(runner)


def _check_factors(detector: nn.Module, state: dict) -> None:
    """Refuse a checkpoint with factors of inputs (``zsq.quantizer.equalize``), which weights make up for, elsewhere."""
    if not any('_quantizer.' in name for name in state):
        return
    loaded, own = (
        {name for name in names if name.endswith('.input_scale')} for names in (state, detector.state_dict())
    )
    if loaded != own:
        raise UserError(
            'the checkpoint divides the inputs of other layers than the model (zsq.quantizer.equalize), such as '
            f'{min(loaded ^ own).removesuffix(".input_scale")} in one of the two, and its weights make up for it. Give '
            'the config that it was trained with, or train again'
        )


def _uninitialized(student: nn.Module) -> list[str]:
    return [name for name, quantizer in quantizers(student) if not quantizer.ready]
