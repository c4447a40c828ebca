# SPDX-License-Identifier: Apache-2.0
"""How teacher and student are run so that their outputs can be compared.

:func:`build_comparison` chooses by what the detector is: most detectors run in mode ``'tensor'``; the RoI heads of a
two-stage detector both see the teacher's proposals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn

from mmzsq.distillation import MASK_ROIS, Outputs, Recorder, foreground, most_confident, why_not_two_stage
from mmzsq.torchvision_ops import at_least_fp32

BOX_ROIS = 256
"""RoIs an image that the box heads are compared on: the teacher's best proposals after suppression."""

MASK_HEAD_ROIS = 32
"""RoIs an image that the mask heads are compared on: those of them that the teacher's box head is surest of."""


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
            inputs: Normalised images (N, 3, H, W).
            data_samples: One ``DetDataSample`` an image, with ``gt_instances`` if losses are wanted.
            with_losses: Whether the student's own losses are wanted.
        """
        with torch.no_grad(), self.recorder_T.recording() as outputs_T:
            self.teacher(inputs, data_samples, mode='tensor')
        losses = None
        with self.recorder_S.recording() as outputs_S:
            if with_losses:
                losses = self.student.loss(inputs, data_samples)
            else:
                self.student(inputs, data_samples, mode='tensor')
        return Compared(outputs_S, outputs_T, losses)


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


def build_comparison(student: nn.Module, teacher: nn.Module, taps: Iterable[str]) -> Comparison:
    """Choose how the two are run by what they are; arguments as of :class:`Comparison`."""
    comparison = TwoStageComparison if why_not_two_stage(student) is None else Comparison
    return comparison(student, teacher, taps)


@contextmanager
def _returning(owner: nn.Module, method: str, result: Any) -> Iterator[None]:
    """Inside the block a method of ``owner`` returns what it has returned already."""
    setattr(owner, method, lambda *args, **kwargs: result)
    try:
        yield
    finally:
        delattr(owner, method)
