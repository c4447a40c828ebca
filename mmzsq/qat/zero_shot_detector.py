# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one model: what MMEngine's Runner trains, evaluates and saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.distillation import BatchAugmentation
from mmzsq.errors import UserError
from mmzsq.models.max_iou_assigner import replace_max_iou_assigners
from mmzsq.models.train_eval_modes import RANDOM_MODULES, frozen_train_mode
from mmzsq.qat.captured_step import CapturedStep
from mmzsq.qat.comparison import Comparison, build_comparison
from mmzsq.qat.frozen_batch_norm import speed_up_frozen_batch_norm
from mmzsq.qat.probe import probe, probe_size
from mmzsq.qat.teacher import load_teacher
from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare, quantized_layers, quantizers
from mmzsq.quantization.allocation import as_settings, assign_bits, overrides_of
from mmzsq.quantization.config import Bits
from mmzsq.registry import MODELS, build_part
from mmzsq.tasks.detection_task import add_ignored_semantic_labels, pixel_range, sum_losses
from mmzsq.tasks.padded_task import TargetCapacity, takes_padded_targets

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
        capture: Whether a training step may run as a CUDA graph, where it can (:meth:`train_step`).
        augmentation: The section ``zsq.train.augmentation``: arguments of
            :class:`~mmzsq.distillation.BatchAugmentation`, or None.
        channels_last: Whether images, features and weights lie in memory channel by channel of a pixel, as the
            convolutions of a GPU read them.

    Raises:
        UserError: If an argument is unfit.
    """

    def __init__(
        self,
        detector: dict[str, Any],
        quantizer: dict[str, Any],
        distillation: dict[str, Any] | None = None,
        teacher: str | None = None,
        bn: str = 'frozen',
        capture: bool = True,
        augmentation: dict[str, float] | None = None,
        channels_last: bool = False,
    ) -> None:
        if bn not in ('frozen', 'train'):
            raise UserError(f"zsq.train.bn is 'frozen' or 'train', not {bn!r}")
        # Building changes the config, as DETR's head does its class weights.
        student: Any = MMDET_MODELS.build(copy.deepcopy(detector))
        # Of float training, such as YOLOX's other sizes of a batch: the images of the set are used as they are.
        student.data_preprocessor.batch_augments = None
        # Of images in pinned memory: the host prepares a step while the GPU is at the one before.
        student.data_preprocessor._non_blocking = True
        super().__init__(data_preprocessor=student.data_preprocessor)
        self.student: Any = student
        self.teacher_checkpoint = teacher
        self.teacher_meta: dict[str, Any] = {}
        self.bn = bn
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        student.to(memory_format=self.memory_format)
        size = probe_size(student)
        self.report = prepare(student, QuantizationConfig.from_dict(quantizer), run=lambda: probe(student, size))
        if bn == 'frozen':
            speed_up_frozen_batch_norm(student)
        replace_max_iou_assigners(student)
        self._unfreeze()
        distillation = distillation or dict(losses=[])
        self.detection_weight = distillation.get('detection_weight', 0.0)
        self.distillation_losses: Any = nn.ModuleList(
            build_part(MODELS, loss, 'zsq.distillation.losses').resolve(student) for loss in distillation['losses']
        )
        self.augmentation: Any = BatchAugmentation.from_cfg(augmentation)
        if augmentation is not None and self.detection_weight:
            raise UserError(
                'zsq.train.augmentation changes images and not their labels: it needs '
                'zsq.distillation.detection_weight=0'
            )
        black, white = pixel_range(self.data_preprocessor)
        self.register_buffer('_black', black, persistent=False)
        self.register_buffer('_white', white, persistent=False)
        self.taps = self._find_taps()
        self.detector_cfg = detector
        self.quantizer_cfg = quantizer
        self._teacher = _Teacher()
        self._predictor = 'student'
        self._comparison: Comparison | None = None
        self._captured_step = CapturedStep(capture)
        self._room = TargetCapacity()
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
            teacher = MMDET_MODELS.build(copy.deepcopy(self.detector_cfg))
            self.teacher_meta = load_teacher(teacher, self.teacher_checkpoint)
            device = next(self.student.parameters()).device
            teacher.to(device=device, memory_format=self.memory_format)
            self._teacher.detector = teacher.eval().requires_grad_(False)
        return self._teacher.detector

    def init_weights(self) -> None:
        """Start the student from the teacher."""
        self.student.load_state_dict(self.load_teacher().state_dict(), strict=False)

    def assign_bits(self, bits: Mapping[str, Bits]) -> None:
        """Give layers bits of their own, as if ``zsq.quantizer.overrides`` had said so from the start.

        Quantizers of these layers begin anew: an optimizer has to be built afterwards.

        Args:
            bits: By the name of a quantized layer.
        """
        own = as_settings(overrides_of(self.report, bits))
        self.quantizer_cfg = dict(self.quantizer_cfg, overrides={**self.quantizer_cfg.get('overrides', {}), **own})
        assign_bits(self.report, QuantizationConfig.from_dict(self.quantizer_cfg), bits)

    def load_bits_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Where bits were allocated (``zsq.quantizer.allocate``), take those of the layers of a checkpoint.

        Args:
            checkpoint: What its file holds.
        """
        trained = checkpoint.get('meta', {}).get('mmzsq', {}).get('quantizer')
        if self.quantizer_cfg.get('allocate') is None or trained is None:
            return
        overrides = QuantizationConfig.from_dict(trained).overrides
        layers = [layer.name for layer in self.report.layers if layer.quantized and layer.weights]
        found = {name: overrides.get(name) for name in layers}
        self.assign_bits({name: bits for name, bits in found.items() if bits is not None})

    @torch.no_grad()
    def initialize_quantizers(self, batches: Iterable[Any]) -> None:
        """Give quantizers that have no steps their first ones, see :func:`~mmzsq.quantization.calibrating`.

        Args:
            batches: Of the data loader, run in eval mode.
        """
        batches = list(batches)

        def run() -> None:
            for batch in batches:
                data = self.data_preprocessor(batch, False)
                self.student(data['inputs'], data['data_samples'], mode='tensor')

        training = self.training
        self.eval()
        if self.quantizer_cfg.get('equalize'):
            equalize(self.student, run)
        with calibrating(self.student):
            run()
        self.train(training)

    def _apply(self, fn: Any, recurse: bool = True) -> ZeroShotDetector:
        if self._teacher.detector is not None:
            self._teacher.detector._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> ZeroShotDetector:
        """Set the student's mode; frozen BatchNorm stays in eval, and what drops at random, which the teacher does not.

        A backbone with ``frozen_stages`` freezes them here. Layers that quantization changed learn all the same, and
        their quantizers have the mode asked for.
        """
        super().train(mode)
        stay = (*RANDOM_MODULES, _BatchNorm) if self.bn == 'frozen' else RANDOM_MODULES
        for module in self.student.modules():
            if isinstance(module, stay):
                module.eval()
        # Also in stages that a backbone freezes, and within attention, which stays in eval mode.
        for _, quantizer in quantizers(self.student):
            quantizer.train(mode)
        self._unfreeze()
        return self

    def _unfreeze(self) -> None:
        for _, layer in quantized_layers(self.student):
            layer.requires_grad_(True)

    def _find_taps(self) -> set[str]:
        taps: set[str] = set()
        for loss in self.distillation_losses:
            names = loss.taps(self.student)
            print_log(f'distillation: {loss} of {_enumerate(names)}', logger='current')
            taps.update(names)
        return taps

    @contextmanager
    def predict_with_teacher(self) -> Iterator[None]:
        """Inside the block ``predict`` is the teacher's."""
        self._predictor = 'teacher'
        try:
            yield
        finally:
            self._predictor = 'student'

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = 'tensor') -> Any:
        """Run as MMDetection's detectors do.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` an image.
            mode: ``'loss'``: dict of distillation losses; ``'predict'``: data samples with ``pred_instances``;
                ``'tensor'``: the student's raw outputs.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        detector = self.teacher if mode == 'predict' and self._predictor == 'teacher' else self.student
        return detector(inputs, data_samples, mode=mode)

    def end_training(self) -> None:
        """Free the memory that steps of training hold; see :meth:`CapturedStep.release`."""
        self._captured_step.release()

    def train_step(
        self, data: Any, optim_wrapper: OptimWrapper, average: Callable[[nn.Module], None] | None = None
    ) -> dict[str, Tensor]:
        """Take one step, as a CUDA graph where all shapes are known before: of labels too, but not of proposals.

        Args:
            data: A batch of the data loader.
            optim_wrapper: Of this model.
            average: Makes the gradients of this model the means over several processes.

        Returns:
            Each loss, and ``'loss'``, their sum.
        """
        data = self.data_preprocessor(data, True)
        capturable = not self.distillation_losses or self.comparison.capturable
        targets = None
        if self.detection_weight and takes_padded_targets(self.student):
            instances = [sample.gt_instances for sample in data['data_samples']]
            targets = self._room.pad(instances, fixed=self._captured_step.graph is not None)
        elif self.detection_weight:
            capturable = False
        return self._captured_step(self, data, optim_wrapper, capturable, average, targets)

    @property
    def comparison(self) -> Comparison:
        """How student and teacher are run; needs the teacher."""
        if self._comparison is None:
            self._comparison = build_comparison(self.student, self.teacher, self.taps)
        return self._comparison

    def loss(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> dict[str, Tensor]:
        """Return the weighted losses of the student: distillation, and detection if it has a weight.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` with ``gt_instances`` an image, or the
                :class:`~mmzsq.models.padded_targets.PaddedTargets` of all if the student's head takes them.
        """
        inputs = inputs.contiguous(memory_format=self.memory_format)
        if self.detection_weight and data_samples is not None:
            add_ignored_semantic_labels(self.student, data_samples)
        if not self.distillation_losses:
            # The teacher, which nobody would read, does not run.
            with frozen_train_mode(self.student):
                return dict(loss_detection=self.detection_weight * sum_losses(self.student.loss(inputs, data_samples)))
        if self.augmentation is not None:
            inputs = self.augmentation(inputs, self._black, self._white)
        outputs_S, outputs_T, detection = self.comparison(inputs, data_samples, bool(self.detection_weight))
        losses: dict[str, Tensor] = {}
        if detection is not None:
            losses['loss_detection'] = self.detection_weight * sum_losses(detection)
        for index, loss in enumerate(self.distillation_losses):
            losses[f'loss_{index}_{type(loss).__name__}'] = loss(outputs_S, outputs_T, self.student)
        return losses


def _enumerate(names: Sequence[str]) -> str:
    """The names, or how many of them there are."""
    return ', '.join(names) if len(names) <= 4 else f'{len(names)} modules from {names[0]} to {names[-1]}'


def _drop_prefix(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        state[prefix + name[len(prefix + PREFIX) :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + PREFIX)]:
        state[prefix + PREFIX + name[len(prefix) :]] = state.pop(name)
