# SPDX-License-Identifier: Apache-2.0
"""Detections drawn on an image: masks, boxes, and class names with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from mmengine.structures import InstanceData

from mmzsq.visualization.gallery import GAP, draw_mask, label_color, title

MIN_SIDE, MAX_SIDE = 640, 1920
"""Limits of the longer side of a picture, in pixels; smaller and larger images are scaled."""
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_detections(image: np.ndarray, found: InstanceData, names: Sequence[str]) -> np.ndarray:
    """Draw detections on a copy of an image.

    Args:
        image: uint8 RGB, (H, W, 3).
        found: ``bboxes`` (n, 4) xyxy in pixels of ``image``, ``scores`` and ``labels`` (n,), and optionally ``masks``
            (n, H, W) bool.
        names: Name of the class of each detection.

    Returns:
        uint8 RGB, (H', W', 3), whose longer side is that of the image within 640 and 1920 pixels.
    """
    height, width = image.shape[:2]
    scale = min(max(height, width, MIN_SIDE), MAX_SIDE) / max(height, width)
    size = (round(width * scale), round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation)
    line = max(1, round(max(size) / MIN_SIDE))
    colors = [label_color(label) for label in found.labels.tolist()]
    if 'masks' in found:
        for mask, color in zip(found.masks.numpy(), colors, strict=True):
            draw_mask(canvas, mask, color)
    corners = [[round(value * scale) for value in bbox] for bbox in found.bboxes.tolist()]
    for (x1, y1, x2, y2), color in zip(corners, colors, strict=True):
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), color, 2 * line)
    # Names last, so that no box covers one; the best detection is drawn last.
    texts = [f'{name} {score:.2f}' for name, score in zip(names, found.scores.tolist(), strict=True)]
    for index in found.scores.argsort().tolist():
        _write(canvas, texts[index], (corners[index][0], corners[index][1]), colors[index], line)
    return canvas


def _write(canvas: np.ndarray, text: str, corner: tuple[int, int], color: tuple[int, int, int], line: int) -> None:
    """Write black text on a colored field above a corner, or where the canvas has room for it."""
    (text_width, text_height), base = cv2.getTextSize(text, FONT, 0.5 * line, line)
    field = (text_width + 4 * line, text_height + base + 2 * line)
    left = max(0, min(corner[0] - line, canvas.shape[1] - field[0]))
    top = max(0, min(corner[1] - field[1], canvas.shape[0] - field[1]))
    cv2.rectangle(canvas, (left, top), (left + field[0], top + field[1]), color, cv2.FILLED)
    origin = (left + 2 * line, top + text_height + line)
    cv2.putText(canvas, text, origin, FONT, 0.5 * line, (0, 0, 0), line, cv2.LINE_AA)


def join_side_by_side(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Join pictures of one height with a title above each.

    Args:
        pictures: uint8 RGB, (H, W, 3), by title.
    """
    titled = [np.concatenate((title(name, picture.shape[1]), picture)) for name, picture in pictures.items()]
    gap = np.full((titled[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in titled for part in (gap, picture)][1:], axis=1)
