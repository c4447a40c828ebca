# SPDX-License-Identifier: Apache-2.0
"""Detection with an exported file alone: its metadata replace the config.

This takes a dense detector whose graph ends at decoded boxes and scores, with class-wise NMS or none. Resizing,
normalization and the selection of detections follow the entries ``resize``, ``mean``, ``std``, ``bgr_to_rgb`` and
``selection``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.models.dense_heads import YOLOV3Head, YOLOXHead
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import batched_nms

from mmzsq.deploy.predictor import read_metadata, run_images, runtime_for
from mmzsq.deploy.runtime import Session
from mmzsq.errors import UserError


def selection_of(head: Any) -> dict[str, Any] | None:
    """Describe how a dense head selects detections from decoded predictions.

    Args:
        head: The ``bbox_head`` of a dense detector.

    Returns:
        ``score_thr``, ``iou_threshold`` (None: no NMS), ``max_per_img`` (None: no limit), ``nms_pre`` (candidates
        before NMS, None: no limit), ``per_level`` (whether ``nms_pre`` counts each level alone), ``one_class`` (whether
        a location yields its best class alone), and ``clip`` (whether boxes are clipped to the network's input before
        NMS). None if NMS is another than class-wise NMS with a threshold.
    """
    own = getattr(head, 'post_processor', None)
    cfg = vars(own) if own is not None else getattr(head, 'test_cfg', None) or {}
    without = own is not None and own.nms is None
    nms = dict(cfg.get('nms') or {})
    unknown = nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or nms.get('class_agnostic')
    if unknown and not without:
        return None
    one_class = isinstance(head, YOLOXHead)
    nms_pre = cfg.get('nms_pre', -1)
    return dict(
        score_thr=cfg.get('score_thr', 0.0),
        iou_threshold=nms.get('iou_threshold'),
        max_per_img=None if one_class else cfg.get('max_per_img'),
        nms_pre=None if one_class or nms_pre < 1 else nms_pre,
        per_level=own is None and not isinstance(head, YOLOV3Head),
        one_class=one_class,
        clip=bool(own is None and getattr(getattr(head, 'bbox_coder', None), 'clip_border', False)),
    )


class StandaloneDetector:
    """An exported file of a dense detector, without its config.

    Args:
        path: The file.
        runtime: ``'onnxruntime'`` or ``'openvino'``; by default the target of the file.
        threads: Number of threads; 0 lets the runtime decide.

    Attributes:
        classes: Class names, None if the file has none.

    Raises:
        UserError: If the metadata do not suffice. The config is needed then.
    """

    def __init__(self, path: str | Path, runtime: str | None = None, threads: int = 0) -> None:
        metadata = read_metadata(path)
        needs = None
        if metadata['outputs'] != 'decoded':
            ends = 'two-stage detectors' if metadata['outputs'] == 'two-stage' else 'the raw maps of a head'
            needs = f'it holds {ends}, whose decoding is that of the config'
        elif json.loads(metadata['resize']) is None:
            needs = 'it does not say how images are resized, because it was exported without a test pipeline'
        elif json.loads(metadata.get('selection', 'null')) is None:
            needs = 'its detector selects detections in another way than by class-wise NMS'
        if needs is not None:
            raise UserError(f'{path} cannot run without its config: {needs}. Add --config CONFIG.')
        self._session = Session(path, runtime_for(path, runtime), threads)
        keys = ('classes', 'mean', 'std', 'bgr_to_rgb', 'resize', 'selection', 'size')
        self._settings = {key: json.loads(metadata[key]) for key in keys}
        self._locations = json.loads(metadata.get('locations', '[]'))
        self.classes: list[str] | None = self._settings['classes']

    def __call__(self, images: Sequence[np.ndarray]) -> list[DetDataSample]:
        """Detect objects.

        Args:
            images: Arrays (H, W, 3) of uint8 in the order B, G, R, as OpenCV reads them.

        Returns:
            One data sample for each image; boxes are in pixels of the image as given.
        """
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> DetDataSample:
        inputs, scale, offset = self._prepare(image)
        outputs = dict(zip(self._session.outputs, run_images(self._session, inputs), strict=True))
        boxes, scores, labels = self._select(
            outputs['boxes'][0], outputs['scores'][0], outputs.get('factors'), (inputs.shape[2], inputs.shape[3])
        )
        boxes = (boxes - torch.tensor([*offset, *offset])) / torch.tensor([*scale, *scale])
        height, width = image.shape[:2]
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=boxes.dtype))
        sample = DetDataSample(metainfo=dict(ori_shape=(height, width)))
        sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        return sample

    def _prepare(self, image: np.ndarray) -> tuple[Tensor, tuple[float, float], tuple[int, int]]:
        """Resize, pad and normalize; also return the scale (width, height) and the offset (left, top)."""
        resize, size = self._settings['resize'], self._settings['size']
        height, width = image.shape[:2]
        frame = resize['scale'] or (size[1], size[0])
        new = list(frame)
        if resize['mode'] == 'letterbox':
            factor = min(frame[0] / width, frame[1] / height)
            new = [max(round(width * factor), 1), max(round(height * factor), 1)]
        elif resize['mode'] == 'keep_ratio':
            factor = min(max(frame) / max(height, width), min(frame) / min(height, width))
            new = [int(width * factor + 0.5), int(height * factor + 0.5)]
        pixels = cv2.resize(image, (new[0], new[1]), interpolation=cv2.INTER_LINEAR)
        left = top = 0
        if resize['pad_value'] is not None:
            frame = frame if resize['mode'] == 'letterbox' else (size[1], size[0])
            if resize['mode'] == 'letterbox':
                left, top = (frame[0] - new[0]) // 2, (frame[1] - new[1]) // 2
            right, bottom = frame[0] - new[0] - left, frame[1] - new[1] - top
            value = (resize['pad_value'],) * 3 if np.isscalar(resize['pad_value']) else tuple(resize['pad_value'])
            if min(right, bottom) >= 0:
                pixels = cv2.copyMakeBorder(pixels, top, bottom, left, right, cv2.BORDER_CONSTANT, value=value)
        pixels = pixels[..., ::-1] if self._settings['bgr_to_rgb'] else pixels
        mean, std = (np.asarray(self._settings[key], np.float32) for key in ('mean', 'std'))
        values = (pixels.astype(np.float32) - mean) / std
        inputs = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
        return inputs, (new[0] / width, new[1] / height), (left, top)

    def _select(
        self, boxes: Tensor, scores: Tensor, factors: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select detections: boxes (n, 4), scores (n,), labels (n,)."""
        rules = self._settings['selection']
        # Heads with centerness or objectness compare the score before the product.
        compared = scores if factors is None else torch.where(scores > 0, scores / factors[0][:, None], 0.0)
        if rules['one_class']:
            best = compared.amax(1, keepdim=True)
            compared = torch.where(compared == best, compared, 0.0)
        if rules['clip']:
            boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype))
        counts = self._locations if rules['per_level'] and self._locations else [len(boxes)]
        kept, start = [], 0
        for count in counts:
            level = compared[start : start + count]
            locations, labels = (level > rules['score_thr']).nonzero(as_tuple=True)
            order = level[locations, labels].sort(descending=True, stable=True).indices[: rules['nms_pre']]
            kept.append(torch.stack((locations[order] + start, labels[order])))
            start += count
        locations, labels = torch.cat(kept, dim=1)
        boxes, values = boxes[locations], scores[locations, labels]
        if rules['iou_threshold'] is None:
            chosen = values.sort(descending=True, stable=True).indices
        else:
            chosen = batched_nms(boxes.double(), values.double(), labels, rules['iou_threshold'])
        chosen = chosen[: rules['max_per_img']]
        return boxes[chosen], values[chosen], labels[chosen]
