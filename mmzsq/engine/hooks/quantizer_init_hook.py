# SPDX-License-Identifier: Apache-2.0
"""Hook that initializes the quantizers from the calibration set."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from mmzsq.atomic_files import delete_unfinished, to_json, write_atomically
from mmzsq.checkpoint import check_structure
from mmzsq.class_names import choose_classes
from mmzsq.config.compose import class_names
from mmzsq.engine.backends import Backends
from mmzsq.engine.console import FILE_ONLY, PhaseProgress
from mmzsq.engine.hooks.calibration_set_hook import BARRIER_TIMEOUT
from mmzsq.engine.progress import ReconstructionProgress
from mmzsq.engine.shared_errors import on_main
from mmzsq.qat.reconstruct import Reconstructor
from mmzsq.qat.student_checkpoint import check_initialized, check_student, uninitialized
from mmzsq.registry import HOOKS
from mmzsq.visualization import draw_steps

PTQ_FILE = 'ptq.pth'
"""File in the work_dir with the student right after initialization: the post-training quantization baseline."""

LAST_CHECKPOINT = 'last_checkpoint'
"""File in the work_dir with the path of the last checkpoint, which MMEngine resumes from."""

REPORT_FILE = 'quantization_report.json'
"""File in the work_dir that lists every layer: bits, scheme and initial steps, or why it stays float."""

CALIBRATING = dict(
    batches='calibration: batches', factors='calibration: input factors of layers', steps='calibration: steps'
)
"""Titles of the phases of :meth:`~mmzsq.qat.ZeroShotDetector.initialize_quantizers`."""


@HOOKS.register_module()
class QuantizerInitHook(Hook):
    """Initializes the quantizers on batches of the calibration set, unless a checkpoint has initialized them.

    Args:
        num_batches: Number of training batches on each rank from which the steps are computed. Defaults to 4.
        reconstruction: The section ``zsq.reconstruction``: arguments of
            :class:`~mmzsq.qat.reconstruct.Reconstructor`. None, the default: no reconstruction.
    """

    # After the model is loaded, and before another hook copies it (EMAHook).
    priority = 'VERY_HIGH'

    def __init__(self, num_batches: int = 4, reconstruction: dict[str, Any] | None = None) -> None:
        self.num_batches = num_batches
        self.reconstruction = reconstruction

    def before_train(self, runner: Runner) -> None:
        """Initialize uninitialized quantizers, and write the PTQ checkpoint and the report.

        Args:
            runner: The runner with the student and the training data.

        Raises:
            UserError: If a file cannot be written.
        """
        detector = runner.detector
        if not uninitialized(detector.student):
            return
        with PhaseProgress(runner.logger, CALIBRATING, 'steps') as progress:
            batches = list(itertools.islice(runner.train_dataloader, self.num_batches))
            detector.initialize_quantizers(batches, progress.update)
        report = detector.report
        runner.logger.info(report.to_table(), extra=FILE_ONLY)
        runner.logger.info(
            f'quantizers initialized on {self.num_batches} batches: {report.summary()}. All layers: '
            f'{Path(runner.work_dir) / REPORT_FILE}, and the log file'
        )
        if self.reconstruction is not None:
            self._reconstruct(runner, batches, Reconstructor(**self.reconstruction, seed=runner.seed))
        Backends(runner).add_image('steps', lambda: draw_steps(detector.student), 0)
        self._save(runner)

    def _reconstruct(self, runner: Runner, batches: list[Any], reconstructor: Reconstructor) -> None:
        """Reconstruct the student in rank 0, and give its state to all processes."""
        detector = runner.detector
        # Rank 0 may take longer than the usual timeout.
        group = dist.new_group(backend='gloo', timeout=BARRIER_TIMEOUT) if get_world_size() > 1 else None

        def reconstruct() -> dict[str, Any]:
            with ReconstructionProgress(runner.logger) as progress:
                reconstructor.run(detector, batches, progress.update_unit)
            return {name: value.cpu() for name, value in detector.state_dict().items()}

        state = on_main(reconstruct, group)
        if get_rank() > 0:
            detector.load_state_dict(state)

    @master_only
    def _save(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        checkpoint = dict(state_dict=runner.detector.state_dict())
        # Allocated bits differ from those of the config.
        self.before_save_checkpoint(runner, checkpoint)
        delete_unfinished(folder, {PTQ_FILE, REPORT_FILE})
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(folder / PTQ_FILE, content.getvalue())
        write_atomically(folder / REPORT_FILE, to_json(runner.detector.report.to_dict(), indent=2))

    def after_train(self, runner: Runner) -> None:
        """Save the student of a run without training as the checkpoint of epoch 0, to test, export or resume it.

        Args:
            runner: The runner after training.
        """
        if runner.max_epochs:
            return
        name = f'epoch_{runner.epoch}.pth'
        runner.save_checkpoint(runner.work_dir, name, meta=dict(epoch=0, iter=0))
        self._name_last_checkpoint(Path(runner.work_dir), name)

    @master_only
    def _name_last_checkpoint(self, folder: Path, name: str) -> None:
        write_atomically(folder / LAST_CHECKPOINT, str(folder / name).encode())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the teacher and the quantizer section in ``meta`` of the checkpoint, for resumed runs and readers.

        Args:
            runner: The runner.
            checkpoint: The checkpoint to complete in place.
        """
        checkpoint.setdefault('meta', {})['mmzsq'] = dict(
            teacher=runner.detector.teacher_checkpoint,
            teacher_sha256=runner.detector.teacher_sha256,
            # Plain data, so that torch.load can read the checkpoint with weights_only=True.
            quantizer=json.loads(json.dumps(runner.detector.quantizer_cfg)),
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reject a checkpoint of another student. MMEngine would load what fits of it.

        Args:
            runner: The runner with the student.
            checkpoint: The loaded checkpoint.

        Raises:
            UserError: If settings of integers differ, or a weight is missing, does not fit or is left over.
        """
        # In training, the optimizer exists, and the runner has already loaded the bits of the checkpoint.
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            runner.detector.load_bits_from(checkpoint)
        name = str(runner._load_from or 'the checkpoint')
        check_structure(checkpoint, name)
        # MMEngine loads it into the model.
        choose_classes(class_names(runner.cfg), checkpoint.get('meta') or {}, None, name)
        checkpoint['state_dict'] = check_student(runner.detector, checkpoint, name)

    def before_test(self, runner: Runner) -> None:
        """Reject a float checkpoint.

        Args:
            runner: The runner with the loaded student.

        Raises:
            UserError: If quantizers are not initialized.
        """
        check_initialized(runner.detector.student)

    def before_val(self, runner: Runner) -> None:
        """Reject a float checkpoint, see :meth:`before_test`."""
        self.before_test(runner)
