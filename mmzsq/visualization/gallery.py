# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of images with their boxes and masks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData

from mmzsq.atomic_files import write_atomically
from mmzsq.errors import UserError
from mmzsq.masks import decode_mask
from mmzsq.synthesis.coco_format import annotation_boxes, parse_coco

TILE = 256
"""Side of the square that an image is scaled to fit, in pixels."""

GAP = 4
"""White space between images, in pixels."""

TITLE_HEIGHT = 28
"""Height of the title above a row, in pixels."""

MASK_OPACITY = 0.15

GENERATE_AGAIN = 'delete it and run the command that generates the set again'


def label_color(label: int) -> tuple[int, int, int]:
    """Return a bright RGB color for a category; neighboring categories differ in hue."""
    hue = int(label * 180 * 0.618034) % 180
    red, green, blue = cv2.cvtColor(np.array([[[hue, 220, 255]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)


def draw_labels(image: np.ndarray, labels: InstanceData, classes: Sequence[str], tile: int = TILE) -> np.ndarray:
    """Draw boxes, category names and masks on a copy of an image, scaled to fit a square.

    Args:
        image: uint8 RGB, (H, W, 3).
        labels: ``bboxes`` (n, 4) xyxy in pixels of ``image``, ``labels`` (n,), and optionally ``masks`` (n, H, W) bool.
        classes: Category names.
        tile: Side of the square in pixels.

    Returns:
        uint8 RGB, (H', W', 3); the longer side is ``tile``.
    """
    height, width = image.shape[:2]
    scale = tile / max(height, width)
    size = (round(width * scale), round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    canvas = cv2.resize(image, size, interpolation=interpolation)
    if 'masks' in labels:
        # Masks first, so that they cover no box and no name.
        for mask, label in zip(labels.masks.numpy(), labels.labels.tolist(), strict=True):
            draw_mask(canvas, mask, label_color(label))
    for bbox, label in zip(labels.bboxes.tolist(), labels.labels.tolist(), strict=True):
        x1, y1, x2, y2 = (round(value * scale) for value in bbox)
        color = label_color(label)
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), color, 1)
        origin = (x1 + 2, min(y1 + 11, size[1] - 2))
        for line, width_ in (((0, 0, 0), 3), (color, 1)):
            cv2.putText(canvas, classes[label], origin, cv2.FONT_HERSHEY_SIMPLEX, 0.38, line, width_, cv2.LINE_AA)
    return canvas


def draw_mask(canvas: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> None:
    """Tint and outline a mask, bool of any resolution, on ``canvas``, uint8 (H, W, 3), in place."""
    size = (canvas.shape[1], canvas.shape[0])
    mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
    canvas[mask] = np.round(canvas[mask] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY)
    outline = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    canvas[outline] = color


def draw_gallery(
    images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[InstanceData], classes: Sequence[str]
) -> np.ndarray:
    """Draw all images in order, on a grid about twice as wide as high.

    Args:
        images: uint8 RGB, (H, W, 3) each.
        labels: One entry for each image, see :func:`draw_labels`.
        classes: Category names.

    Returns:
        uint8 RGB, (H', W', 3).
    """
    tiles = [draw_labels(image, instances, classes) for image, instances in zip(images, labels, strict=True)]
    return _sheet(tiles, min(len(tiles), math.ceil(math.sqrt(2 * len(tiles)))))


def save_gallery(
    path: str | os.PathLike[str],
    images: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[InstanceData],
    classes: Sequence[str],
) -> None:
    """Write a PNG with all images, see :func:`draw_gallery`.

    Args:
        path: The file; replaced atomically.
        images: uint8 RGB, (H, W, 3) each.
        labels: One entry for each image, see :func:`draw_labels`.
        classes: Category names.

    Raises:
        UserError: If the file cannot be written.
    """
    _save(path, draw_gallery(images, labels, classes))


def save_set_gallery(path: str | os.PathLike[str], root: str | os.PathLike[str], indices: Iterable[int]) -> None:
    """Write a PNG with some images of a calibration set and their labels.

    Args:
        path: The file; replaced atomically.
        root: Folder of a complete set.
        indices: Indices of the images.

    Raises:
        UserError: If the file cannot be written, or the set not read.
    """
    save_gallery(path, *load_labeled_images(root, indices))


def save_side_by_side(
    path: str | os.PathLike[str], roots: Mapping[str, str | os.PathLike[str]], indices: Sequence[int]
) -> None:
    """Write a PNG with a titled row of labeled images for each calibration set, the same indices in each row.

    Args:
        path: The file; replaced atomically.
        roots: Maps the title of each row to the folder of a complete set.
        indices: Indices of the images.

    Raises:
        UserError: If the file cannot be written, or a set not read.
    """
    rows = []
    for name, root in roots.items():
        images, labels, classes = load_labeled_images(root, indices)
        row = _sheet([draw_labels(*pair, classes) for pair in zip(images, labels, strict=True)], len(indices))
        rows += [title(name, row.shape[1]), row]
    _save(path, np.concatenate(rows))


def title(text: str, width: int) -> np.ndarray:
    """Return a white strip with text, uint8 (TITLE_HEIGHT, width, 3)."""
    strip = np.full((TITLE_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (2, TITLE_HEIGHT - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return strip


def load_labeled_images(
    root: str | os.PathLike[str], indices: Iterable[int]
) -> tuple[list[np.ndarray], list[InstanceData], list[str]]:
    """Read images of a calibration set and their labels.

    Args:
        root: Folder of a complete set.
        indices: Indices of the images.

    Returns:
        The images, uint8 RGB (H, W, 3); their labels, as in :func:`draw_labels`; the category names.

    Raises:
        UserError: If the set is not complete, its annotations are damaged, an index is out of range, or an image file
            is missing or damaged.
    """
    annotations_file = Path(root) / 'annotations' / 'instances.json'
    if not annotations_file.is_file():
        raise UserError(f'{root} is not the folder of a complete calibration set')
    try:
        coco = parse_coco(annotations_file.read_bytes())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{annotations_file} is damaged ({error!r}): {GENERATE_AGAIN}') from error
    category_index = {category_id: index for index, category_id in enumerate(coco.cats)}
    records = list(coco.imgs.values())
    images, labels = [], []
    for index in indices:
        if not 0 <= index < len(records):
            raise UserError(f'{root} has images 0 to {len(records) - 1}, but {index} was requested')
        record = records[index]
        pixels = cv2.imread(str(Path(root) / 'images' / record['file_name']))
        if pixels is None:
            raise UserError(f'{record["file_name"]} in {root} is missing or damaged: {GENERATE_AGAIN}')
        images.append(pixels[..., ::-1])
        annotations = coco.imgToAnns[record['id']]
        classes = torch.tensor([category_index[a['category_id']] for a in annotations], dtype=torch.long)
        instances = InstanceData(bboxes=annotation_boxes(annotations), labels=classes)
        masks = [decode_mask(a.get('segmentation'), (record['height'], record['width'])) for a in annotations]
        known = [mask for mask in masks if mask is not None]
        if known and len(known) == len(masks):
            instances.masks = torch.stack(known)
        labels.append(instances)
    return images, labels, [category['name'] for category in coco.cats.values()]


def _sheet(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange tiles row by row on white; all cells have the size of the largest tile."""
    rows = math.ceil(len(tiles) / columns)
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (height + GAP) * (index // columns), (width + GAP) * (index % columns)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _save(path: str | os.PathLike[str], sheet: np.ndarray) -> None:
    encoded, content = cv2.imencode('.png', np.ascontiguousarray(sheet[..., ::-1]))
    if not encoded:
        raise RuntimeError('OpenCV cannot encode PNG')
    write_atomically(Path(path), content.tobytes())
