# SPDX-License-Identifier: Apache-2.0
"""Conversion between labels and COCO annotations, and label statistics.

See https://cocodataset.org/#format-data. In the files written here, category ids are class indices plus one, image ids
start at zero, and annotation ids start at one, because pycocotools ignores matches with an annotation of id zero.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from torch import Tensor

from mmzsq.masks import encode_mask


def parse_coco(content: bytes) -> COCO:
    """Parse and index an annotation file.

    Args:
        content: The bytes of the file, JSON.

    Returns:
        The index of pycocotools. Annotations keep the order of the file.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If the content is not a COCO annotation file.
    """
    coco = COCO()
    coco.dataset = json.loads(content)
    # createIndex accepts files that lack these keys, and annotations of unknown images and categories.
    for key in ('categories', 'images', 'annotations'):
        if key not in coco.dataset:
            raise KeyError(key)
    # pycocotools needs ids of annotations, which nothing else here reads.
    for index, annotation in enumerate(coco.dataset['annotations']):
        annotation.setdefault('id', index)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    for annotation in coco.dataset['annotations']:
        for index, key in ((coco.imgs, 'image_id'), (coco.cats, 'category_id')):
            if annotation[key] not in index:
                raise KeyError(annotation[key])
    return coco


def annotation_boxes(annotations: Sequence[dict[str, Any]]) -> Tensor:
    """Return the boxes of annotations.

    Args:
        annotations: n COCO annotations.

    Returns:
        Boxes (n, 4), float32, xyxy in pixels.
    """
    boxes = torch.tensor([annotation['bbox'] for annotation in annotations], dtype=torch.float32)
    boxes = boxes.view(len(annotations), 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def to_annotations(instances: InstanceData) -> list[dict[str, Any]]:
    """Convert the labels of one image to COCO annotations.

    Args:
        instances: ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,), and optionally ``masks`` (n, H, W) bool.

    Returns:
        One dict for each box: ``category_id``, ``bbox`` (xywh, rounded to a thousandth of a pixel), ``area``,
        ``iscrowd``. With masks also ``segmentation`` (compressed run lengths); ``area`` is then that of the mask.
    """
    annotations = []
    for index, (bbox, label) in enumerate(zip(instances.bboxes.tolist(), instances.labels.tolist(), strict=True)):
        x1, y1, x2, y2 = bbox
        xywh = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
        annotation: dict[str, Any] = {
            'category_id': label + 1,
            'bbox': xywh,
            'area': round(xywh[2] * xywh[3], 3),
            'iscrowd': 0,
        }
        if 'masks' in instances:
            mask = instances.masks[index].numpy()
            annotation['area'] = int(mask.sum())
            annotation['segmentation'] = encode_mask(mask)
        annotations.append(annotation)
    return annotations


def to_coco(
    images: Sequence[dict[str, Any]],
    annotations: Sequence[Sequence[dict[str, Any]]],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Build the content of an annotation file.

    Args:
        images: ``file_name``, ``width`` and ``height`` of each image; other keys are dropped.
        annotations: Annotations of each image, as returned by :func:`to_annotations`.
        classes: Class names, in the order of the labels.

    Returns:
        The content of the annotation file.
    """
    flat = [
        {'image_id': image_id, **annotation} for image_id, of_image in enumerate(annotations) for annotation in of_image
    ]
    return {
        'info': {'description': 'synthetic images made by mmzsq'},
        'images': [
            {'id': index, **{key: image[key] for key in ('file_name', 'width', 'height')}}
            for index, image in enumerate(images)
        ],
        'annotations': [{'id': index, **annotation} for index, annotation in enumerate(flat, 1)],
        'categories': [{'id': index, 'name': name} for index, name in enumerate(classes, 1)],
    }


def statistics(coco: dict[str, Any]) -> dict[str, Any]:
    """Count the images, boxes and classes of a data set.

    Args:
        coco: The content of an annotation file.

    Returns:
        Plain numbers, ready for JSON: ``images``; ``boxes``; ``boxes_per_image`` with ``mean``, ``min``, ``max`` and
        ``histogram`` (maps a number of boxes, as text, to the number of images with that many); ``classes`` (maps every
        class name to its number of boxes); ``box_area`` with ``mean``, ``p10``, ``median`` and ``p90`` of box areas as
        fractions of the image area.
    """
    pixels = {image['id']: image['width'] * image['height'] for image in coco['images']}
    per_image = Counter(annotation['image_id'] for annotation in coco['annotations'])
    counts = [per_image[image_id] for image_id in pixels]
    per_class = Counter(annotation['category_id'] for annotation in coco['annotations'])
    areas = [
        annotation['bbox'][2] * annotation['bbox'][3] / pixels[annotation['image_id']]
        for annotation in coco['annotations']
    ]
    p10, median, p90 = np.percentile(areas or [0.0], [10, 50, 90]).tolist()
    return {
        'images': len(counts),
        'boxes': len(areas),
        'boxes_per_image': {
            'mean': float(np.mean(counts)),
            'min': min(counts),
            'max': max(counts),
            'histogram': {str(count): n for count, n in sorted(Counter(counts).items())},
        },
        'classes': {category['name']: per_class[category['id']] for category in coco['categories']},
        'box_area': {
            'mean': float(np.mean(areas or [0.0])),
            'p10': p10,
            'median': median,
            'p90': p90,
        },
    }
