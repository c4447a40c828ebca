# SPDX-License-Identifier: Apache-2.0
"""Forward passes of teacher and student whose recorded outputs can be compared one by one.

:func:`build_paired_forward` chooses the class by the type of the detector. Most detectors run in mode ``'tensor'``. In
a two-stage detector, both RoI heads see the teacher's proposals. In a transformer, both decoders get the queries that
the teacher selected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.models.detectors import DetectionTransformer, ddq_detr
from mmdet.models.layers.transformer import ddq_detr_layers
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mmzsq.distillation import (
    MASK_ROI_INDICES,
    Outputs,
    Recorder,
    foreground,
    most_confident_indices,
    regions_unsupported_reason,
    two_stage_unsupported_reason,
)
from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32
from mmzsq.models.train_eval_modes import eval_mode, frozen_train_mode
from mmzsq.patching import patched
from mmzsq.qat.region_replay import recording_regions, replaying_regions
from mmzsq.tasks.training_losses import detection_losses

MAX_BOX_ROIS = 256
"""RoIs per image on which the box heads are compared: the teacher's best proposals after NMS."""

MAX_MASK_ROIS = 32
"""RoIs per image on which the mask heads are compared: those with the highest scores of the teacher's box head."""

MAX_REGIONS_WITH_MASKS = 64
"""Proposals per image of a :class:`RegionPairedForward` if the RoI head predicts masks for all of them."""

TRANSFORMER_HEAD = 'bbox_head'
"""The head of a transformer. It returns the predictions of all decoder layers as one tensor."""

NMS_CALLERS = (ddq_detr, ddq_detr_layers)
"""Modules of MMDetection that select queries of a transformer by ``batched_nms``: those of DDQ."""

MODE_KEPT = (_BatchNorm,)
"""Modules of the student that keep their mode while the rest is in eval mode: BatchNorm may train."""


class PairedOutputs(NamedTuple):
    """Outputs of a :class:`PairedForward`.

    Attributes:
        student: Outputs of the student, by module name.
        teacher: Outputs of the teacher, without gradients.
        losses: The student's own detection losses, or None if they were not requested.
    """

    student: Outputs
    teacher: Outputs
    losses: dict[str, Any] | None


class PairedForward:
    """Runs both detectors in mode ``'tensor'``; runs ``student.loss`` instead if its losses are requested.

    The heads are in train mode, in which they return the raw and complete outputs that a loss expects.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are recorded.

    Attributes:
        obstacle: Why operations differ between images of one shape, so that no CUDA graph can hold them; None if they
            do not.
    """

    obstacle: ClassVar[str | None] = None

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> None:
        taps = sorted(taps)
        self.student: Any = student
        self.teacher: Any = teacher
        self.recorder_S, self.recorder_T = Recorder(student, taps), Recorder(teacher, taps)

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> PairedOutputs:
        """Run both detectors.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` per image, with ``gt_instances`` if losses are requested.
            with_losses: Whether to compute the student's own losses.
        """
        outputs_T = self.teacher_outputs(inputs, data_samples)
        losses = None
        if with_losses:
            with frozen_train_mode(self.student), self.recorder_S.recording() as outputs_S:
                losses = detection_losses(self.student, inputs, data_samples)
            if _shapes(outputs_S) == _shapes(outputs_T):
                return PairedOutputs(outputs_S, outputs_T, losses)
        # Also needed if the loss calls a head more or less often than mode 'tensor' does, as for mask heads that see
        # selected locations only.
        with frozen_train_mode(self.student), self.recorder_S.recording() as outputs_S:
            self.student(inputs, data_samples, mode='tensor')
        return PairedOutputs(outputs_S, outputs_T, losses)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Outputs:
        """Run the teacher alone.

        Args:
            inputs: Normalized images (N, 3, H, W).
            data_samples: One ``DetDataSample`` per image.

        Returns:
            The same outputs as those of the teacher in both detectors' run.
        """
        with frozen_train_mode(self.teacher), self.recorder_T.recording() as outputs:
            self.teacher(inputs, data_samples, mode='tensor')
        return outputs


class TransformerPairedForward(PairedForward):
    """Runs detectors derived from MMDetection's ``DetectionTransformer`` in eval mode.

    In training, some of them add random denoising queries that depend on the labels, so the outputs of teacher and
    student would belong to different queries. If queries are the top-scoring proposals, with or without suppression of
    overlapping ones, the student takes the proposals at the teacher's indices. The student's own losses need a separate
    forward pass. The predictions of each decoder layer become a separate map (N, queries, ...).
    """

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> PairedOutputs:
        """Run both detectors, see :class:`PairedForward`."""
        with TopkReplay() as topk, recording_nms() as kept:
            outputs_T = self.teacher_outputs(inputs, data_samples)
        with (
            eval_mode(self.student, MODE_KEPT),
            self.recorder_S.recording() as outputs_S,
            TopkReplay(topk.indices),
            replaying_nms(kept),
        ):
            self.student(inputs, data_samples, mode='tensor')
        losses = None
        if with_losses:
            with frozen_train_mode(self.student):
                losses = detection_losses(self.student, inputs, data_samples)
        return PairedOutputs(_by_layer(outputs_S), outputs_T, losses)

    @torch.no_grad()
    def teacher_outputs(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Outputs:
        """Run the teacher alone, see :class:`PairedForward`."""
        with eval_mode(self.teacher), self.recorder_T.recording() as outputs:
            self.teacher(inputs, data_samples, mode='tensor')
        return _by_layer(outputs)


class TopkReplay(TorchFunctionMode):
    """Records the indices that ``torch.topk`` returns inside the block, or replays those of another run.

    Args:
        indices: Indices to replay, in the order of the calls. None: record.

    Attributes:
        indices: Indices that ``torch.topk`` returned so far.
    """

    def __init__(self, indices: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.indices: list[Tensor] = []
        self._replayed = None if indices is None else iter(indices)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``; if it is ``topk`` in a replay, gather the entries at the recorded indices instead."""
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        if self._replayed is None:
            chosen = func(*args, **kwargs)
            self.indices.append(chosen.indices)
            return chosen
        indices = next(self._replayed)
        values, dim = args[0], kwargs.get('dim', args[2] if len(args) > 2 else -1)
        self.indices.append(indices)
        return torch.return_types.topk((values.gather(dim, indices), indices))


@contextmanager
def recording_nms() -> Iterator[list[Any]]:
    """Record the results of ``batched_nms`` in :data:`NMS_CALLERS` inside the block.

    Yields:
        The results, in the order of the calls.
    """
    results: list[Any] = []
    with ExitStack() as stack:
        for module in NMS_CALLERS:
            suppress = module.batched_nms

            def record(*args: Any, suppress: Any = suppress, **kwargs: Any) -> Any:
                results.append(suppress(*args, **kwargs))
                return results[-1]

            stack.enter_context(patched(module, 'batched_nms', record))
        yield results


@contextmanager
def replaying_nms(results: Sequence[Any]) -> Iterator[None]:
    """Return the results of :func:`recording_nms` from ``batched_nms`` in :data:`NMS_CALLERS` inside the block.

    Only the indices of the kept boxes are valid, because the boxes and scores are those of the recorded run.
    """
    calls = iter(results)
    with ExitStack() as stack:
        for module in NMS_CALLERS:
            stack.enter_context(patched(module, 'batched_nms', lambda *args, **kwargs: next(calls)))
        yield


class ProposalPairedForward(PairedForward):
    """Base class for two-stage detectors: both second stages run on the teacher's proposals.

    The second stages run only if ``taps`` has a module of the RoI head.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are recorded.
    """

    obstacle = 'the number of proposals differs between images'

    def __init__(self, student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> None:
        taps = set(taps)
        super().__init__(student, teacher, taps)
        self.rpn_taps = [name for name in taps if name.split('.')[0] == 'rpn_head']
        self.with_rois = any(name.split('.')[0] == 'roi_head' for name in taps)
        self.with_masks = self.student.roi_head.with_mask


class TwoStagePairedForward(ProposalPairedForward):
    """Runs detectors with a standard box head and, optionally, a standard mask head.

    The student's own proposals and NMS are not computed. Its own losses, which need proposals and sampling as in
    training, start from the features and proposal maps of the same forward pass.
    """

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> PairedOutputs:
        """Run both detectors, see :class:`PairedForward`. With RoIs, the teacher has an entry ``MASK_ROI_INDICES``."""
        outputs_T, rois, mask_rois = self._run_teacher(inputs, data_samples)
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
                losses = detection_losses(self.student, inputs, data_samples)
        return PairedOutputs(outputs_S, outputs_T, losses)

    def teacher_outputs(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Outputs:
        """Run the teacher alone, see :class:`PairedForward`."""
        return self._run_teacher(inputs, data_samples)[0]

    @torch.no_grad()
    def _run_teacher(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> tuple[Outputs, Tensor, Tensor]:
        """Return the teacher's outputs, its RoIs (R, 5), and the indices of those of the mask head, (M,)."""
        assert data_samples is not None
        rois, mask_rois = inputs.new_zeros(0, 5), inputs.new_zeros(0, dtype=torch.long)
        with self.recorder_T.recording() as outputs:
            features = self.teacher.extract_feat(inputs)
            maps = self.teacher.rpn_head(features)
            if self.with_rois:
                rois, counts = self._propose(maps, data_samples)
                # Autocast would round the pixel coordinates of boxes and RoIs to 16 bits, by about 4 pixels at 640.
                precise = [at_least_fp32(level) for level in features]
                scores, _ = foreground(self.teacher.roi_head._bbox_forward(precise, rois)['cls_score'])
                mask_rois = most_confident_indices(scores, counts, MAX_MASK_ROIS)
                if self.with_masks:
                    self.teacher.roi_head._mask_forward(precise, rois[mask_rois])
                outputs[MASK_ROI_INDICES] = [mask_rois]
        return outputs, rois, mask_rois

    def _propose(
        self, maps: tuple[list[Tensor], list[Tensor]], data_samples: Sequence[Any]
    ) -> tuple[Tensor, list[int]]:
        """Return the proposals of the teacher as at test time.

        Returns:
            RoIs (R, 5), image index and xyxy pixels, and the number of RoIs of each image.
        """
        cfg = self.teacher.rpn_head.test_cfg.copy()
        cfg.max_per_img = min(cfg.max_per_img, MAX_BOX_ROIS)
        proposals = self.teacher.rpn_head.predict_by_feat(
            *([at_least_fp32(level) for level in levels] for levels in maps),
            batch_img_metas=[sample.metainfo for sample in data_samples],
            cfg=cfg,
        )
        return bbox2roi([instances.bboxes for instances in proposals]), [len(instances) for instances in proposals]


class RegionPairedForward(ProposalPairedForward):
    """Runs detectors with any second stage on the regions that the teacher's second stage sees.

    This covers all stages of a cascade, grid heads and mask heads: each stage of the student sees the boxes that the
    teacher's previous stage has refined. The heads are in eval mode. The student's own losses need a separate pass of
    the heads on the same features.
    """

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None, with_losses: bool) -> PairedOutputs:
        """Run both detectors, see :class:`PairedForward`."""
        assert data_samples is not None
        outputs_T, proposals, regions = self._run_teacher(inputs, data_samples)
        with eval_mode(self.student, MODE_KEPT), self.recorder_S.recording() as outputs_S:
            features = self.student.extract_feat(inputs)
            # Some proposal networks have no maps (Sparse R-CNN), others compute them in stages that predict() calls.
            if 'rpn_head' in self.rpn_taps:
                self.student.rpn_head(features)
            elif any(outputs_T[name] for name in self.rpn_taps):
                self.student.rpn_head.predict(features, data_samples, rescale=False)
            if self.with_rois:
                with replaying_regions(self.student.roi_head, regions):
                    self._run_roi_head(self.student, features, proposals, data_samples)
        losses = None
        if with_losses:
            with frozen_train_mode(self.student), _returning(self.student, 'extract_feat', features):
                losses = detection_losses(self.student, inputs, data_samples)
        return PairedOutputs(outputs_S, outputs_T, losses)

    def teacher_outputs(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Outputs:
        """Run the teacher alone, see :class:`PairedForward`."""
        return self._run_teacher(inputs, data_samples)[0]

    @torch.no_grad()
    def _run_teacher(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> tuple[Outputs, list[Any], Any]:
        """Return the teacher's outputs, its proposals, and what :func:`recording_regions` recorded."""
        assert data_samples is not None
        proposals: list[Any] = []
        regions: Any = None
        with eval_mode(self.teacher), self.recorder_T.recording() as outputs:
            features = self.teacher.extract_feat(inputs)
            if self.rpn_taps or self.with_rois:
                proposals = self._propose(features, data_samples)
            if self.with_rois:
                with recording_regions(self.teacher.roi_head) as regions:
                    self._run_roi_head(self.teacher, features, proposals, data_samples)
        return outputs, proposals, regions

    def _propose(self, features: Any, data_samples: Sequence[Any]) -> list[Any]:
        """Return the teacher's best proposals, one non-empty ``InstanceData`` per image."""
        limit = MAX_REGIONS_WITH_MASKS if self.with_masks else MAX_BOX_ROIS
        found = self.teacher.rpn_head.predict(features, data_samples, rescale=False)
        # Proposals without scores, such as learned ones, are not ranked and must stay together.
        found = [result[:limit] if 'scores' in result else result for result in found]
        return [
            result if len(result) else _whole_image(sample, result.bboxes.device)
            for result, sample in zip(found, data_samples, strict=True)
        ]

    @staticmethod
    def _run_roi_head(detector: Any, features: Any, proposals: Sequence[Any], data_samples: Sequence[Any]) -> None:
        # Autocast would round the pixel coordinates of boxes to 16 bits.
        precise = [at_least_fp32(level) for level in features]
        # Copies, because a RoI head may remove fields from its proposals.
        detector.roi_head.forward(precise, [result.new() for result in proposals], data_samples)


def build_paired_forward(student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> PairedForward:
    """Choose the :class:`PairedForward` for a type of detector.

    Args:
        student: The quantized detector.
        teacher: The float detector.
        taps: Names of the modules whose outputs are recorded.
    """
    if isinstance(student, DetectionTransformer):
        return TransformerPairedForward(student, teacher, taps)
    if two_stage_unsupported_reason(student) is None:
        return TwoStagePairedForward(student, teacher, taps)
    if regions_unsupported_reason(student) is None:
        return RegionPairedForward(student, teacher, taps)
    return PairedForward(student, teacher, taps)


def _whole_image(sample: Any, device: torch.device) -> InstanceData:
    """Return one proposal that covers the image of a ``DetDataSample``."""
    height, width = sample.img_shape[:2]
    return InstanceData(bboxes=torch.tensor([[0.0, 0.0, width, height]], device=device))


def _by_layer(outputs: Outputs) -> Outputs:
    """Split the predictions of a transformer's head by decoder layer, in place."""
    if TRANSFORMER_HEAD in outputs:
        outputs[TRANSFORMER_HEAD] = [layer for layers in outputs[TRANSFORMER_HEAD] for layer in layers]
    return outputs


def _shapes(outputs: Outputs) -> dict[str, list[torch.Size]]:
    return {name: [tensor.shape for tensor in tensors] for name, tensors in outputs.items()}


def _returning(owner: nn.Module, method: str, result: Any) -> AbstractContextManager[None]:
    """Patch ``method`` of ``owner`` to return ``result``, which was computed before, whatever its arguments."""
    return patched(owner, method, lambda *args, **kwargs: result)
