# SPDX-License-Identifier: Apache-2.0
"""Which of YOLOv5's dense predictions are detections: score threshold and class-wise NMS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import batched_nms

from mmzsq.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Selects detections; a place may be a detection of several classes.

    Args:
        score_thr: Least score, in [0, 1]; a score is objectness times class probability.
        nms: ``dict(type='nms', iou_threshold=...)``: of two boxes of one class that overlap more,
            the worse goes.
        nms_pre: Most candidates of an image that enter NMS.
        max_per_img: Most detections of an image.

    Raises:
        UserError: If ``nms`` is another kind, or a number is outside its range.
    """

    score_thr: float = 0.001
    nms: Mapping[str, Any] = field(default_factory=lambda: dict(type='nms', iou_threshold=0.6))
    nms_pre: int = 30000
    max_per_img: int = 300

    def __post_init__(self) -> None:
        """Check the settings."""
        if set(self.nms) != {'type', 'iou_threshold'} or self.nms['type'] != 'nms':
            raise UserError(f"test_cfg.nms must be dict(type='nms', iou_threshold=...), not {dict(self.nms)}")
        for name, value in (
            ('score_thr', self.score_thr),
            ('nms.iou_threshold', self.nms['iou_threshold']),
        ):
            if not 0 <= value <= 1:
                raise UserError(f'test_cfg.{name} must be in [0, 1], not {value}')
        for name, value in (('nms_pre', self.nms_pre), ('max_per_img', self.max_per_img)):
            if value < 1:
                raise UserError(f'test_cfg.{name} must be at least 1, not {value}')

    def __call__(self, bboxes: Tensor, obj_scores: Tensor, cls_scores: Tensor) -> InstanceData:
        """Select the detections of one image.

        Args:
            bboxes: Boxes of P places, xyxy in pixels, shape (P, 4).
            obj_scores: Objectness in [0, 1], shape (P,).
            cls_scores: Class probabilities, shape (P, C).

        Returns:
            ``bboxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,), best first.
        """
        likely = obj_scores > self.score_thr
        bboxes, scores = bboxes[likely], obj_scores[likely, None] * cls_scores[likely]
        places, labels = (scores > self.score_thr).nonzero(as_tuple=True)
        scores, order = scores[places, labels].sort(descending=True, stable=True)
        order = order[: self.nms_pre]
        bboxes, scores, labels = bboxes[places[order]], scores[: self.nms_pre], labels[order]
        # In float64: where torchvision tells classes apart by an offset, float32 would round the
        # coordinates.
        kept = batched_nms(bboxes.double(), scores.double(), labels, self.nms['iou_threshold'])
        kept = kept[: self.max_per_img]
        return InstanceData(bboxes=bboxes[kept], scores=scores[kept], labels=labels[kept])
