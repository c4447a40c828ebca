# SPDX-License-Identifier: Apache-2.0
"""Which dense predictions of a YOLO are detections, and where they lie in the original image.

Score threshold and class-wise NMS; then the letterbox is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import batched_nms

from mmzsq.errors import UserError


@dataclass(frozen=True)
class PostProcessor:
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

    def process_batch(
        self,
        bboxes: Tensor,
        obj_scores: Tensor,
        cls_scores: Tensor,
        img_metas: Sequence[Mapping[str, Any]],
        rescale: bool,
    ) -> list[InstanceData]:
        """Select the detections of each image.

        Args:
            bboxes: Boxes of P places, xyxy in pixels of the network's input, shape (N, P, 4).
            obj_scores: Objectness in [0, 1], shape (N, P).
            cls_scores: Class probabilities, shape (N, P, C).
            img_metas: Of each image ``img_shape``; to rescale also ``ori_shape``, ``scale_factor`` and, when it was
                letterboxed, ``pad_param``.
            rescale: Whether boxes are to refer to the original image instead of the network's input.

        Returns:
            Per image ``bboxes`` (n, 4) xyxy in pixels, clipped to the image, ``scores`` (n,) and ``labels`` (n,), best
            first.
        """
        results = []
        for index, meta in enumerate(img_metas):
            result = self(bboxes[index], obj_scores[index], cls_scores[index])
            result.bboxes = _to_image(result.bboxes, meta) if rescale else _clip(result.bboxes, meta['img_shape'])
            results.append(result)
        return results


def _to_image(bboxes: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Undo letterbox and resize, and clip to the original image.

    Args:
        bboxes: Boxes, xyxy in pixels of the network's input, shape (n, 4).
        meta: ``scale_factor`` (width, height), ``ori_shape`` and optionally ``pad_param`` (top,
            bottom, left, right).
    """
    top, _, left, _ = meta.get('pad_param', (0, 0, 0, 0))
    scale_x, scale_y = meta['scale_factor']
    x, y = (bboxes[:, 0::2] - left) / scale_x, (bboxes[:, 1::2] - top) / scale_y
    return _clip(torch.stack((x, y), dim=-1).flatten(1), meta['ori_shape'])


def _clip(bboxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Clip boxes (n, 4) xyxy to an image of ``shape`` (height, width)."""
    x, y = bboxes[:, 0::2].clamp(0, shape[1]), bboxes[:, 1::2].clamp(0, shape[0])
    return torch.stack((x, y), dim=-1).flatten(1)
