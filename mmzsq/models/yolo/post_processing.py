# SPDX-License-Identifier: Apache-2.0
"""Post-processing of YOLO predictions: score threshold, class-wise NMS or none, and mapping boxes to the original."""

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
    """Select detections from dense predictions. A location can yield detections of several classes.

    Args:
        score_thr: Minimum score in [0, 1]. The score is the objectness times the class probability.
        nms: ``dict(type='nms', iou_threshold=...)``. NMS is applied to each class separately. None: no NMS, for a head
            that predicts each object at one location.
        nms_pre: Maximum number of candidates per image before NMS.
        max_per_img: Maximum number of detections per image.

    Raises:
        UserError: If ``nms`` has another type or a number is out of range.
    """

    score_thr: float = 0.001
    nms: Mapping[str, Any] | None = field(default_factory=lambda: dict(type='nms', iou_threshold=0.6))
    nms_pre: int = 30000
    max_per_img: int = 300

    def __post_init__(self) -> None:
        """Check the settings."""
        fractions = [('score_thr', self.score_thr)]
        if self.nms is not None:
            if set(self.nms) != {'type', 'iou_threshold'} or self.nms['type'] != 'nms':
                raise UserError(
                    f"test_cfg.nms must be dict(type='nms', iou_threshold=...) or None, not {dict(self.nms)}"
                )
            fractions.append(('nms.iou_threshold', self.nms['iou_threshold']))
        for name, value in fractions:
            if not 0 <= value <= 1:
                raise UserError(f'test_cfg.{name} must be in [0, 1], not {value}')
        for name, value in (('nms_pre', self.nms_pre), ('max_per_img', self.max_per_img)):
            if value < 1:
                raise UserError(f'test_cfg.{name} must be at least 1, not {value}')

    def __call__(self, bboxes: Tensor, obj_scores: Tensor, cls_scores: Tensor) -> InstanceData:
        """Select the detections of one image.

        Args:
            bboxes: Boxes of P locations in xyxy pixels, shape (P, 4).
            obj_scores: Objectness in [0, 1], shape (P,).
            cls_scores: Class probabilities, shape (P, C).

        Returns:
            ``bboxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,), sorted by descending score.
        """
        likely = obj_scores > self.score_thr
        bboxes, scores = bboxes[likely], obj_scores[likely, None] * cls_scores[likely]
        locations, labels = (scores > self.score_thr).nonzero(as_tuple=True)
        scores, order = scores[locations, labels].sort(descending=True, stable=True)
        order = order[: self.nms_pre]
        bboxes, scores, labels = bboxes[locations[order]], scores[: self.nms_pre], labels[order]
        if self.nms is not None:
            # torchvision may separate classes by adding offsets to the boxes. In float32 this would round coordinates.
            kept = batched_nms(bboxes.double(), scores.double(), labels, self.nms['iou_threshold'])
            bboxes, scores, labels = bboxes[kept], scores[kept], labels[kept]
        top = slice(self.max_per_img)
        return InstanceData(bboxes=bboxes[top], scores=scores[top], labels=labels[top])

    def process_batch(
        self,
        bboxes: Tensor,
        obj_scores: Tensor,
        cls_scores: Tensor,
        img_metas: Sequence[Mapping[str, Any]],
        rescale: bool,
    ) -> list[InstanceData]:
        """Select the detections of each image in a batch.

        Args:
            bboxes: Boxes of P locations in xyxy pixels of the network's input, shape (N, P, 4).
            obj_scores: Objectness in [0, 1], shape (N, P).
            cls_scores: Class probabilities, shape (N, P, C).
            img_metas: Metadata of each image: ``img_shape``, and for ``rescale`` also ``ori_shape``, ``scale_factor``
                and, for letterboxed images, ``pad_param``.
            rescale: Whether to return boxes in pixels of the original image instead of the network's input.

        Returns:
            Per image, ``bboxes`` (n, 4) in xyxy pixels, clipped to the image, ``scores`` (n,) and ``labels`` (n,),
            sorted by descending score.
        """
        results = []
        for index, meta in enumerate(img_metas):
            result = self(bboxes[index], obj_scores[index], cls_scores[index])
            result.bboxes = _to_image(result.bboxes, meta) if rescale else _clip(result.bboxes, meta['img_shape'])
            results.append(result)
        return results


def _to_image(bboxes: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Map boxes from the network's input to the original image and clip them to it.

    Args:
        bboxes: Boxes in xyxy pixels of the network's input, shape (n, 4).
        meta: ``scale_factor`` (width, height), ``ori_shape`` and optionally ``pad_param`` (top, bottom, left, right).
    """
    top, _, left, _ = meta.get('pad_param', (0, 0, 0, 0))
    scale_x, scale_y = meta['scale_factor']
    x, y = (bboxes[:, 0::2] - left) / scale_x, (bboxes[:, 1::2] - top) / scale_y
    return _clip(torch.stack((x, y), dim=-1).flatten(1), meta['ori_shape'])


def _clip(bboxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Clip boxes (n, 4) in xyxy pixels to an image of ``shape`` (height, width)."""
    x, y = bboxes[:, 0::2].clamp(0, shape[1]), bboxes[:, 1::2].clamp(0, shape[0])
    return torch.stack((x, y), dim=-1).flatten(1)
