# SPDX-License-Identifier: Apache-2.0
"""Teacher and student as one model for MMEngine's Runner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.dist import get_world_size, is_distributed
from mmengine.logging import print_log
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.checkpoint import file_sha256
from mmzsq.distillation import BatchAugmentation, DistillationLoss
from mmzsq.errors import UserError
from mmzsq.models.gradient_checkpointing import turn_off_checkpointing
from mmzsq.models.max_iou_assigner import replace_max_iou_assigners
from mmzsq.models.multi_instance_roi_head import accept_few_objects
from mmzsq.models.train_eval_modes import RANDOM_MODULES, frozen_train_mode, kept_buffers
from mmzsq.qat.accumulated_update import AccumulatedUpdate, Part
from mmzsq.qat.captured_step import CapturedStep
from mmzsq.qat.dry_run import dry_run, dry_run_size
from mmzsq.qat.frozen_batch_norm import speed_up_frozen_batch_norm
from mmzsq.qat.paired_forward import PairedForward, build_paired_forward
from mmzsq.qat.teacher import load_teacher
from mmzsq.qat.update_regions import update_regions
from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare, quantized_layers, quantizers
from mmzsq.quantization.allocation import assign_bits, overrides_for, overrides_to_dict
from mmzsq.quantization.config import Bits
from mmzsq.registry import MODELS, build_part
from mmzsq.tasks.detection_task import add_ignored_semantic_labels, pixel_range, sum_losses
from mmzsq.tasks.padded_task import TargetCapacity, takes_padded_targets
from mmzsq.tasks.training_losses import detection_losses
from mmzsq.update_parts import UpdateParts

STUDENT_PREFIX = 'student.'


class _TeacherHolder:
    """Holds the teacher outside the module tree, so that checkpoints, optimizers, DDP and EMA copies exclude it."""

    def __init__(self) -> None:
        self.detector: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _TeacherHolder:
        return self


@MODELS.register_module()
class ZeroShotDetector(BaseModel):
    """A quantized detector, the student, that is distilled from its full-precision original, the teacher.

    The state dict contains only the student, under the names of the float detector. Therefore a float checkpoint can be
    loaded, and a checkpoint of the student can be loaded without the teacher.

    Args:
        detector: Config of the float detector for MMDetection.
        quantizer: The section ``zsq.quantizer``.
        distillation: The section ``zsq.distillation``: ``detection_weight``, the weight of the detector's own loss on
            the labels of the calibration set, and ``losses``, configs of
            :class:`~mmzsq.distillation.DistillationLoss`.
        teacher: Checkpoint of the float detector, a file or URL. :meth:`load_teacher` reads it.
        bn: ``'frozen'``: BatchNorm of the student keeps the teacher's statistics. ``'train'``: it updates them.
        capture: Whether training steps may run as a CUDA graph, see :meth:`train_step`.
        augmentation: The section ``zsq.train.augmentation``: arguments of
            :class:`~mmzsq.distillation.BatchAugmentation`, or None.
        channels_last: Whether to store images, features and weights in channels-last memory format.
        teacher_sha256: SHA-256 that the file of the teacher must have, or None.

    Attributes:
        teacher_sha256: SHA-256 of the file of the teacher, once it is loaded; None if it has no local file.
        quantizer_cfg: The section ``zsq.quantizer`` as plain data, with the overrides of :meth:`assign_bits`.
            Checkpoints store it.
        quantization_config: The same section, parsed.
        report: The :class:`~mmzsq.quantization.QuantizationReport` of the student.
        update_ends: Whether the next batch is the last one of its update, even if the update has fewer batches than
            ``zsq.train.accumulate``. The train loop sets it at the end of an epoch.

    Raises:
        UserError: If an argument is not valid.
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
        teacher_sha256: str | None = None,
    ) -> None:
        if bn not in ('frozen', 'train'):
            raise UserError(f"zsq.train.bn must be 'frozen' or 'train', but is {bn!r}")
        # A copy, because building may modify the config: DETR's head does so with its class weights.
        student: Any = _build(copy.deepcopy(detector))
        turn_off_checkpointing(student)
        if bn == 'frozen' or not is_distributed():
            # MMEngine does this later, and would drop the hooks of the quantizers with the layers that it replaces.
            student = revert_sync_batchnorm(student)
        # Such as YOLOX's random resizing of batches, which is for float training only.
        student.data_preprocessor.batch_augments = None
        # With pinned images, the host prepares a step while the GPU runs the previous one.
        student.data_preprocessor._non_blocking = True
        super().__init__(data_preprocessor=student.data_preprocessor)
        self.student: Any = student
        self.teacher_checkpoint = teacher
        self.teacher_meta: dict[str, Any] = {}
        self.teacher_sha256: str | None = None
        self._expected_teacher_sha256 = teacher_sha256
        self.bn = bn
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        student.to(memory_format=self.memory_format)
        size = dry_run_size(student)
        self._set_quantizer_cfg(quantizer)
        self.report = prepare(
            student, self.quantization_config, run=lambda: dry_run(student, size), image_size=(size, size)
        )
        if bn == 'frozen':
            speed_up_frozen_batch_norm(student)
        replace_max_iou_assigners(student)
        accept_few_objects(student)
        self._unfreeze_quantized_layers()
        distillation = distillation or dict(losses=[])
        self.detection_weight = distillation.get('detection_weight', 0.0)
        self.distillation_losses: Any = nn.ModuleList(
            build_part(MODELS, loss, f'zsq.distillation.losses[{index}]', DistillationLoss).resolve(student)
            for index, loss in enumerate(distillation['losses'])
        )
        self.augmentation: Any = BatchAugmentation.from_cfg(augmentation)
        if augmentation is not None and self.detection_weight:
            raise UserError(
                'zsq.train.augmentation changes images but not their labels: it requires '
                'zsq.distillation.detection_weight=0'
            )
        black, white = pixel_range(self.data_preprocessor)
        self.register_buffer('_black', black, persistent=False)
        self.register_buffer('_white', white, persistent=False)
        self.taps = self._collect_taps()
        self.detector_cfg = detector
        self._teacher = _TeacherHolder()
        self._predictor = 'student'
        self._paired_forward: PairedForward | None = None
        self._captured_step = CapturedStep(capture)
        self._accumulated_update = AccumulatedUpdate()
        self.update_ends = False
        self._update_ratio = 1.0
        self._target_capacity = TargetCapacity()
        self._register_state_dict_hook(_drop_prefix)
        # The public name of this method is not there before torch 2.5.
        self._register_load_state_dict_pre_hook(_add_prefix, with_module=True)

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
        """Build and load the teacher on the student's device; later calls return the same object.

        Raises:
            UserError: If the checkpoint is missing or belongs to another detector.
        """
        if self._teacher.detector is None:
            teacher = MMDET_MODELS.build(copy.deepcopy(self.detector_cfg))
            turn_off_checkpointing(teacher)
            self.teacher_meta = load_teacher(teacher, self.teacher_checkpoint, self._expected_teacher_sha256)
            self.teacher_sha256 = file_sha256(str(self.teacher_checkpoint))
            device = next(self.student.parameters()).device
            teacher.to(device=device, memory_format=self.memory_format)
            self._teacher.detector = teacher.eval().requires_grad_(False)
        return self._teacher.detector

    def init_weights(self) -> None:
        """Initialize the student with the teacher's weights."""
        self.student.load_state_dict(self.load_teacher().state_dict(), strict=False)

    def assign_bits(self, bits: Mapping[str, Bits]) -> None:
        """Set the bits of single layers, as if ``zsq.quantizer.overrides`` had contained them from the start.

        The quantizers of these layers are replaced by uninitialized ones. Build the optimizer afterwards.

        Args:
            bits: Bits by the name of a quantized layer.
        """
        own = overrides_to_dict(overrides_for(self.report, bits))
        overrides = {**self.quantizer_cfg.get('overrides', {}), **own}
        self._set_quantizer_cfg(dict(self.quantizer_cfg, overrides=overrides))
        assign_bits(self.report, self.quantization_config, bits)

    def load_bits_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the bits of each layer from a checkpoint, if bits are allocated (``zsq.quantizer.allocate``).

        Args:
            checkpoint: Content of the checkpoint file.
        """
        if self.quantization_config.allocate is None:
            return
        trained = trained_quantization(checkpoint)
        if trained is None:
            return
        overrides = trained.overrides
        layers = [layer.name for layer in self.report.layers if layer.quantized and layer.weights]
        found = {name: overrides.get(name) for name in layers}
        self.assign_bits({name: bits for name, bits in found.items() if bits is not None})

    @torch.no_grad()
    def initialize_quantizers(
        self,
        batches: Iterable[Any],
        on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        """Initialize the steps of uninitialized quantizers, see :func:`~mmzsq.quantization.calibrating`.

        Args:
            batches: Batches of the data loader. They run in eval mode.
            on_progress: Called with a phase, the number of its steps that are done, and their total number:
                ``'batches'`` that ran, input ``'factors'`` of layers, and ``'steps'`` of quantizers.
        """
        batches = list(batches)

        def run() -> None:
            on_progress('batches', 0, len(batches))
            for done, batch in enumerate(batches, 1):
                data = self.data_preprocessor(batch, False)
                self.student(data['inputs'], data['data_samples'], mode='tensor')
                on_progress('batches', done, len(batches))

        training = self.training
        self.eval()
        if self.quantization_config.equalize:
            equalize(self.student, run, on_progress)
        with calibrating(self.student, on_progress):
            run()
        self.train(training)

    def _apply(self, fn: Any, recurse: bool = True) -> ZeroShotDetector:
        if self._teacher.detector is not None:
            self._teacher.detector._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> ZeroShotDetector:
        """Set the mode of the student.

        Dropout and similar random modules stay in eval mode, because the teacher has none; so does frozen BatchNorm. A
        backbone with ``frozen_stages`` freezes these stages here, but quantized layers are trained nevertheless, and
        all quantizers get the requested mode.

        Args:
            mode: True for train mode, False for eval mode.
        """
        super().train(mode)
        stay = (*RANDOM_MODULES, _BatchNorm) if self.bn == 'frozen' else RANDOM_MODULES
        for module in self.student.modules():
            if isinstance(module, stay):
                module.eval()
        # Includes those in frozen stages, and in attention, which stays in eval mode.
        for _, quantizer in quantizers(self.student):
            quantizer.train(mode)
        self._unfreeze_quantized_layers()
        return self

    def _set_quantizer_cfg(self, cfg: dict[str, Any]) -> None:
        self.quantizer_cfg = cfg
        self.quantization_config = QuantizationConfig.from_dict(cfg)

    def _unfreeze_quantized_layers(self) -> None:
        for _, layer in quantized_layers(self.student):
            layer.requires_grad_(True)
        for name, quantizer in quantizers(self.student):
            if name.endswith('output_quantizer'):
                quantizer.requires_grad_(True)

    def _collect_taps(self) -> set[str]:
        taps: set[str] = set()
        for loss in self.distillation_losses:
            names = loss.taps(self.student)
            print_log(f'distillation: {loss} on {_summarize_names(names)}', logger='current')
            taps.update(names)
        return taps

    @contextmanager
    def predict_with_teacher(self) -> Iterator[None]:
        """Use the teacher for mode ``'predict'`` inside the block."""
        self._predictor = 'teacher'
        try:
            yield
        finally:
            self._predictor = 'student'

    def forward(self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = 'tensor') -> Any:
        """Run the student, with the interface of MMDetection's detectors.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` per image.
            mode: ``'loss'``, ``'predict'`` or ``'tensor'``.

        Returns:
            ``'loss'``: the dict of :meth:`loss`. ``'predict'``: data samples with ``pred_instances``, of the teacher
            inside :meth:`predict_with_teacher`. ``'tensor'``: raw outputs.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        detector = self.teacher if mode == 'predict' and self._predictor == 'teacher' else self.student
        return detector(inputs, data_samples, mode=mode)

    @property
    def update_is_open(self) -> bool:
        """Whether batches wait for others of the same weight update (``zsq.train.accumulate``)."""
        return bool(self._accumulated_update.parts)

    @property
    def captures_steps(self) -> bool:
        """Whether training steps currently run as a CUDA graph."""
        return self._captured_step.graph is not None

    def end_training(self) -> None:
        """Free the memory of captured training steps, see :meth:`CapturedStep.release`."""
        self._captured_step.release()
        self._accumulated_update.parts.clear()

    def train_step(
        self, data: Any, optim_wrapper: OptimWrapper, average: Callable[[nn.Module], None] | None = None
    ) -> dict[str, Tensor]:
        """Take one training step, as a CUDA graph if all shapes are fixed.

        If gradients are accumulated, the batch waits until all batches of the update are there. A detection loss in
        several processes takes the same path, which averages its divisors over them.

        Labels have a fixed shape if the head takes padded targets. Proposals of a two-stage detector have none.

        Args:
            data: A batch of the data loader.
            optim_wrapper: Optimizer wrapper of this model.
            average: Averages the gradients of this model over all processes.

        Returns:
            Each loss, and their sum as ``'loss'``; empty if the batch waits for others.
        """
        data = _preprocess(self.data_preprocessor, data)
        obstacle = self.paired_forward.obstacle if self.distillation_losses else None
        targets = None
        if self.detection_weight and takes_padded_targets(self.student):
            instances = [sample.gt_instances for sample in data['data_samples']]
            targets = self._target_capacity.pad(instances, fixed=self._captured_step.graph is not None)
        elif self.detection_weight:
            obstacle = "the detector's own loss assigns labels image by image"
        own_divisors = bool(self.detection_weight) and targets is None and get_world_size() > 1
        if optim_wrapper._accumulative_counts > 1 or own_divisors:
            self._captured_step.say_why('several batches make one update', data['inputs'])
            labels = data['data_samples'] if targets is None else targets
            part = Part(self.augment(data['inputs']), labels)
            return self._accumulated_update(self, part, optim_wrapper, average, self.update_ends)
        self.set_update_ratio(get_world_size())
        with UpdateParts().replaying():
            return self._captured_step(self, data, optim_wrapper, obstacle, average, targets)

    @property
    def paired_forward(self) -> PairedForward:
        """The joint forward pass of student and teacher.

        Raises:
            RuntimeError: Before :meth:`load_teacher`.
        """
        if self._paired_forward is None:
            self._paired_forward = build_paired_forward(self.student, self.teacher, self.taps)
        return self._paired_forward

    def loss(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> dict[str, Tensor]:
        """Augment the images and return :meth:`losses`.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` with ``gt_instances`` per image, or
                :class:`~mmzsq.models.padded_targets.PaddedTargets` of all images if the student's head takes them.

        Returns:
            Scalar losses by name.
        """
        return self.losses(self.augment(inputs), data_samples)

    def augment(self, inputs: Tensor) -> Tensor:
        """Return images as the losses take them: in the memory format of the weights, and augmented.

        Args:
            inputs: Normalized images (N, 3, H, W).
        """
        inputs = inputs.contiguous(memory_format=self.memory_format)
        # Without distillation, images keep their labels.
        if self.augmentation is not None and self.distillation_losses:
            inputs = self.augmentation(inputs, self._black, self._white)
        return inputs

    def set_update_ratio(self, ratio: float) -> None:
        """Tell the quantizers of activations how large an update is, for LSQ's gradient scale.

        Args:
            ratio: Images of the whole update for each image of the next batch.
        """
        if ratio == self._update_ratio:
            return
        self._update_ratio = ratio
        for name, quantizer in quantizers(self.student):
            if not name.endswith('weight_quantizer'):
                quantizer.update_ratio = ratio

    @torch.no_grad()
    def run_divisors(self, inputs: Tensor, data_samples: Any, distillation: bool = True) -> None:
        """Compute the divisors of all losses in the order of :meth:`losses`. Only random generators change.

        Those of distillation depend on the teacher alone, those of the detection loss also on the student.

        Args:
            inputs: Images from :meth:`augment`.
            data_samples: As in :meth:`loss`.
            distillation: Whether to include those of distillation.
        """
        outputs = None
        if distillation and self.distillation_losses:
            # The student's regions will be those of the teacher.
            with update_regions(self.teacher):
                outputs = self.paired_forward.teacher_outputs(inputs, data_samples)
        if self.detection_weight:
            # Losses may modify labels, and BatchNorm in train mode its statistics.
            labels = copy.deepcopy(data_samples)
            add_ignored_semantic_labels(self.student, labels)
            with kept_buffers(self.student), frozen_train_mode(self.student), update_regions(self.student):
                detection_losses(self.student, inputs, labels)
        if outputs is not None:
            for loss in self.distillation_losses:
                loss(outputs, outputs, self.student)

    def losses(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        """Return the weighted distillation losses, and the detection loss if it has a weight.

        Args:
            inputs: Images from :meth:`augment`.
            data_samples: As in :meth:`loss`.

        Returns:
            Scalar losses by name.
        """
        if self.detection_weight and data_samples is not None:
            add_ignored_semantic_labels(self.student, data_samples)
        if not self.distillation_losses:
            # No loss reads the teacher's outputs.
            with frozen_train_mode(self.student), update_regions(self.student):
                own = detection_losses(self.student, inputs, data_samples)
            return dict(loss_detection=self.detection_weight * sum_losses(own))
        with update_regions(self.student):
            outputs_S, outputs_T, detection = self.paired_forward(inputs, data_samples, bool(self.detection_weight))
        losses: dict[str, Tensor] = {}
        if detection is not None:
            losses['loss_detection'] = self.detection_weight * sum_losses(detection)
        for index, loss in enumerate(self.distillation_losses):
            losses[f'loss_{index}_{type(loss).__name__}'] = loss(outputs_S, outputs_T, self.student)
        return losses


def trained_quantization(checkpoint: Mapping[str, Any]) -> QuantizationConfig | None:
    """Read the ``zsq.quantizer`` section that a checkpoint was trained with.

    Args:
        checkpoint: Content of its file.

    Returns:
        The parsed section, or None if no run of this package wrote the checkpoint.

    Raises:
        UserError: If the section is not valid.
    """
    trained = checkpoint.get('meta', {}).get('mmzsq', {}).get('quantizer')
    return None if trained is None else QuantizationConfig.from_dict(trained)


def _build(detector: dict[str, Any]) -> Any:
    """Build the float detector. Its config is the user's, and so is an exception of its classes."""
    try:
        return MMDET_MODELS.build(detector)
    except UserError:
        raise
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f'model of the config cannot be built: {type(error).__name__}: {error}. Correct its arguments.'
        ) from error


def _preprocess(preprocessor: nn.Module, batch: Any) -> dict[str, Any]:
    """Normalize and pad a batch for training, with a list of data samples as labels.

    In its training mode, MMDetection's ``DetDataPreprocessor`` also pads masks. Preprocessors of other projects, such
    as MMYOLO's, want another format of batches in that mode, and return labels in another format. All of them accept a
    list of data samples outside of it.
    """
    data: dict[str, Any] = preprocessor(batch, False)
    for wanted, pad in (('pad_mask', 'pad_gt_masks'), ('pad_seg', 'pad_gt_sem_seg')):
        if getattr(preprocessor, wanted, False) and data['data_samples'] is not None:
            getattr(preprocessor, pad)(data['data_samples'])
    return data


def _summarize_names(names: Sequence[str]) -> str:
    """List up to four names, or give their number and the first and last one."""
    return ', '.join(names) if len(names) <= 4 else f'{len(names)} modules from {names[0]} to {names[-1]}'


def _drop_prefix(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + STUDENT_PREFIX)]:
        state[prefix + name[len(prefix + STUDENT_PREFIX) :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + STUDENT_PREFIX)]:
        state[prefix + STUDENT_PREFIX + name[len(prefix) :]] = state.pop(name)
