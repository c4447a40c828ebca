# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one model: what MMEngine's Runner trains, evaluates and saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.detectors.task import blank_samples, sum_losses
from mmzsq.detectors.teacher import load_teacher
from mmzsq.distillation import Recorder
from mmzsq.errors import UserError
from mmzsq.quantization import QuantizationConfig, prepare
from mmzsq.registry import MODELS, build_part

PREFIX = 'student.'


class _Teacher:
    """Holds the teacher outside of the module tree: no checkpoint, optimizer, DDP or copy for EMA includes it."""

    def __init__(self) -> None:
        self.detector: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Teacher:
        return self


@MODELS.register_module()
class ZeroShotDetector(BaseModel):
    """A detector with quantized layers that learns from its full-precision self.

    Its state dict is the student's alone, under the float detector's names: a float checkpoint loads into it, and its
    checkpoint loads without the teacher.

    Args:
        detector: Config of the float detector, as MMDetection builds it.
        quantizer: The section ``zsq.quantizer``.
        distillation: The section ``zsq.distillation``: ``detection_weight`` of the detector's own loss on the set's
            labels, and ``losses``, configs of :class:`~mmzsq.distillation.DistillationLoss`.
        teacher: Checkpoint of the float detector, file or URL. Read by :meth:`load_teacher`.
        bn: ``'frozen'``: the student's BatchNorm keeps the teacher's statistics; ``'train'``: it gathers new ones.
    """

    def __init__(
        self,
        detector: dict[str, Any],
        quantizer: dict[str, Any],
        distillation: dict[str, Any] | None = None,
        teacher: str | None = None,
        bn: str = 'frozen',
    ) -> None:
        if bn not in ('frozen', 'train'):
            raise UserError(f"zsq.train.bn is 'frozen' or 'train', not {bn!r}")
        student: Any = MMDET_MODELS.build(detector)
        super().__init__(data_preprocessor=student.data_preprocessor)
        self.student: Any = student
        self.teacher_checkpoint = teacher
        self.teacher_meta: dict[str, Any] = {}
        self.bn = bn
        self.report = prepare(student, QuantizationConfig.from_dict(quantizer), run=lambda: probe(student))
        distillation = distillation or dict(losses=[])
        self.detection_weight = distillation.get('detection_weight', 0.0)
        self.distillation_losses: Any = nn.ModuleList(
            build_part(MODELS, loss, 'zsq.distillation.losses') for loss in distillation['losses']
        )
        self.detector_cfg = detector
        self.quantizer_cfg = quantizer
        self._teacher = _Teacher()
        self._predictor = 'student'
        self._recorders: tuple[Recorder, Recorder] | None = None
        self._register_state_dict_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @property
    def teacher(self) -> nn.Module:
        """The frozen full-precision detector.

        Raises:
            RuntimeError: Before :meth:`load_teacher`.
        """
        if self._teacher.detector is None:
            raise RuntimeError('the teacher is not loaded yet: call load_teacher()')
        return self._teacher.detector

    def load_teacher(self) -> nn.Module:
        """Build and load the teacher, once, on the student's device.

        Raises:
            UserError: If the checkpoint is missing or not of this detector.
        """
        if self._teacher.detector is None:
            teacher = MMDET_MODELS.build(self.detector_cfg)
            self.teacher_meta = load_teacher(teacher, self.teacher_checkpoint)
            device = next(self.student.parameters()).device
            self._teacher.detector = teacher.to(device).eval().requires_grad_(False)
        return self._teacher.detector

    def init_weights(self) -> None:
        """Start the student from the teacher."""
        self.student.load_state_dict(self.load_teacher().state_dict(), strict=False)

    def _apply(self, fn: Any, recurse: bool = True) -> ZeroShotDetector:
        if self._teacher.detector is not None:
            self._teacher.detector._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> ZeroShotDetector:
        """Set the student's mode; frozen BatchNorm stays in eval."""
        super().train(mode)
        if self.bn == 'frozen':
            for module in self.student.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @contextmanager
    def predicting_with_teacher(self) -> Iterator[None]:
        """Inside the block ``predict`` is the teacher's."""
        self._predictor = 'teacher'
        try:
            yield
        finally:
            self._predictor = 'student'

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = 'tensor') -> Any:
        """Run as MMDetection's detectors do.

        Args:
            inputs: Normalised images (N, 3, H, W).
            data_samples: One ``DetDataSample`` an image.
            mode: ``'loss'``: dict of distillation losses; ``'predict'``: data samples with ``pred_instances``;
                ``'tensor'``: the student's raw outputs.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        detector = self.teacher if mode == 'predict' and self._predictor == 'teacher' else self.student
        return detector(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> dict[str, Tensor]:
        """Return the weighted losses of the student: distillation, and detection if it has a weight.

        Args:
            inputs: Normalised images (N, 3, H, W).
            data_samples: One ``DetDataSample`` with ``gt_instances`` an image.
        """
        if self._recorders is None:
            taps = {name for loss in self.distillation_losses for name in loss.taps(self.student)}
            self._recorders = (Recorder(self.student, sorted(taps)), Recorder(self.teacher, sorted(taps)))
        recorder_S, recorder_T = self._recorders
        with torch.no_grad(), recorder_T.recording() as outputs_T:
            self.teacher(inputs, data_samples, mode='tensor')
        losses: dict[str, Tensor] = {}
        with recorder_S.recording() as outputs_S:
            if self.detection_weight:
                losses['loss_detection'] = self.detection_weight * sum_losses(self.student.loss(inputs, data_samples))
            else:
                self.student(inputs, data_samples, mode='tensor')
        for index, loss in enumerate(self.distillation_losses):
            losses[f'loss_{index}_{type(loss).__name__}'] = loss(outputs_S, outputs_T, self.student)
        return losses


def probe(detector: nn.Module, image_size: int = 64) -> Any:
    """Run ``detector`` once on a grey image, for what :func:`~mmzsq.quantization.prepare` learns from a run.

    Args:
        detector: A float detector.
        image_size: Side of the image in pixels.

    Returns:
        The raw outputs.
    """
    device = next(detector.parameters()).device
    inputs = torch.zeros(1, 3, image_size, image_size, device=device)
    return detector(inputs, blank_samples(1, (image_size, image_size), device), mode='tensor')


def _drop_prefix(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        state[prefix + name[len(prefix + PREFIX) :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + PREFIX)]:
        state[prefix + PREFIX + name[len(prefix) :]] = state.pop(name)
