# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of images with their boxes and masks: the look that no loss replaces."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.synthesis.coco_format import read_mask

TILE = 256
GAP = 4
MASK_OPACITY = 0.15


def _colour(label: int) -> tuple[int, int, int]:
    """A bright RGB colour of its own for each category."""
    hue = int(label * 180 * 0.618034) % 180
    red, green, blue = cv2.cvtColor(np.array([[[hue, 220, 255]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)


def draw_labels(image: np.ndarray, labels: InstanceData, classes: Sequence[str], tile: int = TILE) -> np.ndarray:
    """Draw boxes, category names and masks on a copy of an image, scaled to fit a square tile.

    Args:
        image: uint8 RGB, (H, W, 3).
        labels: ``bboxes`` (n, 4) xyxy in pixels of ``image``, ``labels`` (n,), and perhaps ``masks`` (n, H, W) bool.
        classes: Category names.
        tile: Side of the tile in pixels.

    Returns:
        uint8 RGB, (tile, tile, 3).
    """
    height, width = image.shape[:2]
    scale = tile / max(height, width)
    size = (round(width * scale), round(height * scale))
    canvas = np.full((tile, tile, 3), 255, np.uint8)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    canvas[: size[1], : size[0]] = cv2.resize(image, size, interpolation=interpolation)
    if 'masks' in labels:
        # Below all boxes and names.
        for mask, label in zip(labels.masks.numpy(), labels.labels.tolist(), strict=True):
            _draw_mask(canvas[: size[1], : size[0]], mask, _colour(label))
    for bbox, label in zip(labels.bboxes.tolist(), labels.labels.tolist(), strict=True):
        x1, y1, x2, y2 = (round(value * scale) for value in bbox)
        colour = _colour(label)
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), colour, 1)
        origin = (x1 + 2, min(y1 + 11, tile - 2))
        for line, width_ in (((0, 0, 0), 3), (colour, 1)):
            cv2.putText(canvas, classes[label], origin, cv2.FONT_HERSHEY_SIMPLEX, 0.38, line, width_, cv2.LINE_AA)
    return canvas


def _draw_mask(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Tint and outline a mask, bool of any resolution, on ``canvas``, uint8 (H, W, 3), in place."""
    size = (canvas.shape[1], canvas.shape[0])
    mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
    canvas[mask] = np.round(canvas[mask] * (1 - MASK_OPACITY) + np.array(colour) * MASK_OPACITY)
    outline = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    canvas[outline] = colour


def save_gallery(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[InstanceData],
    classes: Sequence[str],
) -> None:
    """Write a PNG with all images, about twice as wide as high, in the order given.

    Args:
        path: The file, replaced at once.
        images: uint8 RGB, (H, W, 3) each.
        labels: One entry an image, see :func:`draw_labels`.
        classes: Category names.
    """
    tiles = [draw_labels(image, instances, classes) for image, instances in zip(images, labels, strict=True)]
    columns = min(len(tiles), math.ceil(math.sqrt(2 * len(tiles))))
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (TILE + GAP) - GAP, columns * (TILE + GAP) - GAP, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (TILE + GAP) * (index // columns), (TILE + GAP) * (index % columns)
        sheet[top : top + TILE, left : left + TILE] = tile
    part = Path(path).with_suffix('.part.png')
    cv2.imwrite(str(part), sheet[..., ::-1])
    os.replace(part, path)


def save_set_gallery(path: str | os.PathLike[str], root: str | os.PathLike[str], indices: Iterable[int]) -> None:
    """Write a PNG with images of a calibration set, chosen by index, and their labels.

    Args:
        path: The file, replaced at once.
        root: Folder of a complete set.
        indices: Which images.
    """
    coco = json.loads((Path(root) / 'annotations' / 'instances.json').read_text())
    category_index = {category['id']: index for index, category in enumerate(coco['categories'])}
    annotations = defaultdict(list)
    for annotation in coco['annotations']:
        annotations[annotation['image_id']].append(annotation)
    images, labels = [], []
    for index in indices:
        image = coco['images'][index]
        pixels = cv2.imread(str(Path(root) / 'images' / image['file_name']))
        if pixels is None:
            raise UserError(f'{image["file_name"]} in {root} is missing or damaged: run CalibrationSet.verify()')
        images.append(pixels[..., ::-1])
        of_image = annotations[image['id']]
        boxes = torch.tensor([a['bbox'] for a in of_image], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([category_index[a['category_id']] for a in of_image], dtype=torch.long)
        instances = InstanceData(bboxes=boxes, labels=classes)
        masks = [read_mask(a.get('segmentation'), (image['height'], image['width'])) for a in of_image]
        known = [mask for mask in masks if mask is not None]
        if known and len(known) == len(masks):
            instances.masks = torch.stack(known)
        labels.append(instances)
    save_gallery(path, images, labels, [category['name'] for category in coco['categories']])
