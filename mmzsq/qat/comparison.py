# SPDX-License-Identifier: Apache-2.0
"""How teacher and student are run so that their outputs can be compared.

:func:`build_comparison` chooses by what the detector is: most detectors run in mode ``'tensor'``; the RoI heads of a
two-stage detector both see the teacher's proposals, the decoders of a transformer both the queries that it chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.models.detectors import DetectionTransformer
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mmzsq.distillation import (
    MASK_ROIS,
    Outputs,
    Recorder,
    foreground,
    most_confident,
    regions_unsupported_reason,
    two_stage_unsupported_reason,
)
from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32
from mmzsq.models.train_eval_modes import eval_mode, frozen_train_mode
from mmzsq.patching import patched
from mmzsq.qat.region_replay import recording_regions, replaying_regions
from mmzsq.quantization import LSQ

BOX_ROIS = 256
"""RoIs an image that the box heads are compared on: the teacher's best proposals after suppression."""

MASK_HEAD_ROIS = 32
"""RoIs an image that the mask heads are compared on: those of them that the teacher's box head is surest of."""


REGIONS_WITH_MASKS = 64
"""Proposals an image of a :class:`RegionComparison` where all of them get masks."""

HEAD = 'bbox_head'
"""The head of a transformer, which answers after each layer of the decoder, all in one tensor."""

LEARNING = (_BatchNorm, LSQ)
"""Of a student that acts as in use, what keeps its mode: quantizers leave values as they are in train mode alone."""


class Compared(NamedTuple):
    """What a comparison yields.

    Attributes:
        student: Outputs of the student, by module name.
        teacher: Outputs of the teacher, without gradients.
        losses: The student's own detection losses; None if not asked for.
    """

    student: Outputs
    teacher: Outputs
    losses: dict[str, Any] | None


class Comparison:
    """Runs both detectors in mode ``'tensor'``; the student for its own loss instead, where that is wanted.

    Their heads act as in training: what they return there is what a loss takes, raw and complete.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are wanted.

    Attributes:
        capturable: Whether what runs is the same for all images of a shape.
    """

    capturable: ClassVar[bool] = True

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> None:
        taps = sorted(taps)
        self.student: Any = student
        self.teacher: Any = teacher
        self.recorder_S, self.recorder_T = Recorder(student, taps), Recorder(teacher, taps)

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> Compared:
        """Run both.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` an image, with ``gt_instances`` if losses are wanted.
            with_losses: Whether the student's own losses are wanted.
        """
        with (
            torch.no_grad(),
            frozen_train_mode(self.teacher),
            self.recorder_T.recording() as outputs_T,
        ):
            self.teacher(inputs, data_samples, mode='tensor')
        losses = None
        if with_losses:
            with frozen_train_mode(self.student), self.recorder_S.recording() as outputs_S:
                losses = self.student.loss(inputs, data_samples)
            if _shapes(outputs_S) == _shapes(outputs_T):
                return Compared(outputs_S, outputs_T, losses)
        # Also where the loss runs a head more often than mode 'tensor', or less, as mask heads of picked locations do.
        with frozen_train_mode(self.student), self.recorder_S.recording() as outputs_S:
            self.student(inputs, data_samples, mode='tensor')
        return Compared(outputs_S, outputs_T, losses)


class TransformerComparison(Comparison):
    """Runs detectors of MMDetection's ``DetectionTransformer`` as they act in use.

    In training some see denoising queries beside their own, random ones that depend on the labels: answers to different
    questions. Where queries are the likeliest of many proposals, the student takes those at the places of the
    teacher's. Its own losses take a run of their own. What the head says after each layer of the decoder is yielded as
    a map of its own, (N, queries, ...).
    """

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> Compared:
        """Run both, see :class:`Comparison`."""
        with (
            torch.no_grad(),
            eval_mode(self.teacher),
            self.recorder_T.recording() as outputs_T,
            TopkReplay() as choices,
        ):
            self.teacher(inputs, data_samples, mode='tensor')
        with eval_mode(self.student, LEARNING), self.recorder_S.recording() as outputs_S, TopkReplay(choices.made):
            self.student(inputs, data_samples, mode='tensor')
        for outputs in (outputs_S, outputs_T):
            if HEAD in outputs:
                outputs[HEAD] = [answers for layers in outputs[HEAD] for answers in layers]
        losses = None
        if with_losses:
            with frozen_train_mode(self.student):
                losses = self.student.loss(inputs, data_samples)
        return Compared(outputs_S, outputs_T, losses)


class TopkReplay(TorchFunctionMode):
    """Inside the block ``torch.topk`` writes down which entries it chose, or chooses those of another run.

    Args:
        made: Indices that another run chose, in the order of its calls; None: to write down.

    Attributes:
        made: The indices chosen.
    """

    def __init__(self, made: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._given = None if made is None else iter(made)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``, or pick what it would have chosen in the other run."""
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        if self._given is None:
            chosen = func(*args, **kwargs)
            self.made.append(chosen.indices)
            return chosen
        indices = next(self._given)
        values, dim = args[0], kwargs.get('dim', args[2] if len(args) > 2 else -1)
        self.made.append(indices)
        return torch.return_types.topk((values.gather(dim, indices), indices))


class TwoStageComparison(Comparison):
    """Runs the RoI heads of both detectors on the teacher's proposals, if any of their outputs is wanted.

    The student makes no proposals, and no suppression of its own. Its own losses, with proposals and sampling as in
    training, go on from the features and proposal maps that are compared.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are wanted.
    """

    capturable = False  # the number of proposals differs

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> None:
        taps = set(taps)
        super().__init__(student, teacher, taps)
        self.with_rois = any(name.split('.')[0] == 'roi_head' for name in taps)
        self.with_masks = self.student.roi_head.with_mask

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> Compared:
        """Run both, see :class:`Comparison`; with RoIs, the teacher's outputs hold ``MASK_ROIS``."""
        assert data_samples is not None
        with torch.no_grad(), self.recorder_T.recording() as outputs_T:
            features = self.teacher.extract_feat(inputs)
            maps = self.teacher.rpn_head(features)
            if self.with_rois:
                rois, counts = self._propose(maps, data_samples)
                # Under autocast, pixels of boxes and RoIs would be rounded to 16 bits, some 4 of them at 640.
                precise = [at_least_fp32(level) for level in features]
                scores, _ = foreground(self.teacher.roi_head._bbox_forward(precise, rois)['cls_score'])
                mask_rois = most_confident(scores, counts, MASK_HEAD_ROIS)
                if self.with_masks:
                    self.teacher.roi_head._mask_forward(precise, rois[mask_rois])
                outputs_T[MASK_ROIS] = [mask_rois]
        with self.recorder_S.recording() as outputs_S:
            features = self.student.extract_feat(inputs)
            maps = self.student.rpn_head(features)
            if self.with_rois:
                precise = [at_least_fp32(level) for level in features]
                self.student.roi_head._bbox_forward(precise, rois)
                if self.with_masks:
                    self.student.roi_head._mask_forward(precise, rois[mask_rois])
        losses = None
        if with_losses:
            with (
                frozen_train_mode(self.student),
                _returning(self.student, 'extract_feat', features),
                _returning(self.student.rpn_head, 'forward', maps),
            ):
                losses = self.student.loss(inputs, data_samples)
        return Compared(outputs_S, outputs_T, losses)

    def _propose(
        self, maps: tuple[list[Tensor], list[Tensor]], data_samples: Sequence[Any]
    ) -> tuple[Tensor, list[int]]:
        """The teacher's proposals, as it makes them in use.

        Returns:
            RoIs, image index and xyxy pixels, (R, 5); how many of each image.
        """
        cfg = self.teacher.rpn_head.test_cfg.copy()
        cfg.max_per_img = min(cfg.max_per_img, BOX_ROIS)
        proposals = self.teacher.rpn_head.predict_by_feat(
            *([at_least_fp32(level) for level in levels] for levels in maps),
            batch_img_metas=[sample.metainfo for sample in data_samples],
            cfg=cfg,
        )
        return bbox2roi([instances.bboxes for instances in proposals]), [len(instances) for instances in proposals]


class RegionComparison(Comparison):
    """Runs the second stages of both detectors, whatever is in them, on the regions that the teacher looks at.

    All stages of a cascade, grids and masks included: the student looks where the teacher's boxes have moved to. Heads
    act as in use. The student's own losses take a run of their own, from the same features.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are wanted.
    """

    capturable = False  # the number of proposals differs

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> None:
        taps = set(taps)
        super().__init__(student, teacher, taps)
        self.rpn_taps = [name for name in taps if name.split('.')[0] == 'rpn_head']
        self.with_rois = any(name.split('.')[0] == 'roi_head' for name in taps)
        self.limit = REGIONS_WITH_MASKS if self.student.roi_head.with_mask else BOX_ROIS

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> Compared:
        """Run both, see :class:`Comparison`."""
        assert data_samples is not None
        with torch.no_grad(), eval_mode(self.teacher), self.recorder_T.recording() as outputs_T:
            features = self.teacher.extract_feat(inputs)
            if self.rpn_taps or self.with_rois:
                proposals = self._propose(features, data_samples)
            if self.with_rois:
                with recording_regions(self.teacher.roi_head) as regions:
                    self._look(self.teacher, features, proposals, data_samples)
        with eval_mode(self.student, LEARNING), self.recorder_S.recording() as outputs_S:
            features = self.student.extract_feat(inputs)
            # A proposal network may have no maps, as that of Sparse R-CNN, or make them in stages that it calls itself.
            if 'rpn_head' in self.rpn_taps:
                self.student.rpn_head(features)
            elif any(outputs_T[name] for name in self.rpn_taps):
                self.student.rpn_head.predict(features, data_samples, rescale=False)
            if self.with_rois:
                with replaying_regions(self.student.roi_head, regions):
                    self._look(self.student, features, proposals, data_samples)
        losses = None
        if with_losses:
            with frozen_train_mode(self.student), _returning(self.student, 'extract_feat', features):
                losses = self.student.loss(inputs, data_samples)
        return Compared(outputs_S, outputs_T, losses)

    def _propose(self, features: Any, data_samples: Sequence[Any]) -> list[Any]:
        """The teacher's best proposals, for each image one ``InstanceData``, never empty."""
        found = self.teacher.rpn_head.predict(features, data_samples, rescale=False)
        # What is not ranked, such as learnt proposals, belongs together.
        found = [result[: self.limit] if 'scores' in result else result for result in found]
        return [
            result if len(result) else _whole_image(sample, result.bboxes.device)
            for result, sample in zip(found, data_samples, strict=True)
        ]

    @staticmethod
    def _look(detector: Any, features: Any, proposals: Sequence[Any], data_samples: Sequence[Any]) -> None:
        """Run the second stage; it may take fields out of the proposals."""
        # Under autocast, pixels of boxes would be rounded to 16 bits.
        precise = [at_least_fp32(level) for level in features]
        detector.roi_head.forward(precise, [result.new() for result in proposals], data_samples)


def build_comparison(student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> Comparison:
    """Choose how the two are run by what they are; arguments as of :class:`Comparison`."""
    if isinstance(student, DetectionTransformer):
        return TransformerComparison(student, teacher, taps)
    if two_stage_unsupported_reason(student) is None:
        return TwoStageComparison(student, teacher, taps)
    if regions_unsupported_reason(student) is None:
        return RegionComparison(student, teacher, taps)
    return Comparison(student, teacher, taps)


def _whole_image(sample: Any, device: torch.device) -> InstanceData:
    """The image of a ``DetDataSample`` as its only proposal."""
    height, width = sample.img_shape[:2]
    return InstanceData(bboxes=torch.tensor([[0.0, 0.0, width, height]], device=device))


def _shapes(outputs: Outputs) -> dict[str, list[torch.Size]]:
    return {name: [tensor.shape for tensor in tensors] for name, tensors in outputs.items()}


def _returning(owner: nn.Module, method: str, result: Any) -> AbstractContextManager[None]:
    """Patch ``method`` of ``owner`` to return ``result``, which was computed before, whatever its arguments."""
    return patched(owner, method, lambda *args, **kwargs: result)
