# SPDX-License-Identifier: Apache-2.0
"""Labels as COCO's annotations, the form that every detection tool reads, and back, and their statistics.

See https://cocodataset.org/#format-data. Category ids are class indices plus one, image ids count
from zero, annotation ids from one (pycocotools takes an annotation of id zero for none).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torch import Tensor


def to_annotations(instances: InstanceData) -> list[dict[str, Any]]:
    """Describe the labels of one image.

    Args:
        instances: ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,), and perhaps ``masks`` (n, H,
            W) bool.

    Returns:
        One dict a box: ``category_id``, ``bbox`` (xywh, to a thousandth of a pixel), ``area``,
        ``iscrowd``, and ``segmentation`` (compressed RLE) where there are masks, whose pixels then
        make up the area.
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
            mask = instances.masks[index].numpy().astype(np.uint8)
            rle = coco_mask.encode(np.asfortranarray(mask))
            annotation['area'] = int(mask.sum())
            annotation['segmentation'] = {
                'size': rle['size'],
                'counts': rle['counts'].decode('ascii'),
            }
        annotations.append(annotation)
    return annotations


def read_mask(segmentation: Any, image_size: tuple[int, int]) -> Tensor | None:
    """Read the mask of one annotation.

    Args:
        segmentation: What stands under that key: polygons (lists of x, y, x, y, ... in pixels), or run lengths,
            compressed or not; or None.
        image_size: Height and width of its image in pixels.

    Returns:
        Shape (H, W), bool; None if there is no segmentation, or none with a pixel in it.
    """
    if isinstance(segmentation, list):
        # Fewer than three points bound nothing.
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not segmentation:
        return None
    if isinstance(segmentation, list) or isinstance(segmentation['counts'], list):
        segmentation = coco_mask.frPyObjects(segmentation, *image_size)
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(segmentation)
    mask = torch.from_numpy(coco_mask.decode(segmentation)).bool()
    return mask if mask.any() else None


def to_coco(
    images: Sequence[dict[str, Any]],
    annotations: Sequence[Sequence[dict[str, Any]]],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Put a data set together.

    Args:
        images: ``file_name``, ``width`` and ``height`` of each; other keys are left out.
        annotations: Of each image, as :func:`to_annotations` makes them.
        classes: Names, in the order of the labels.

    Returns:
        What an annotation file holds.
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
    """Count what is in a data set.

    Args:
        coco: What an annotation file holds.

    Returns:
        Plain numbers, ready for JSON: ``images``; ``boxes``; ``boxes_per_image`` with ``mean``,
        ``min``, ``max`` and ``histogram`` (number of boxes, as text, to number of images);
        ``classes`` (name to number of boxes, every class); ``box_area`` with ``mean``, ``p10``,
        ``median``, ``p90`` of the boxes' shares of their image.
    """
    pixels = {image['id']: image['width'] * image['height'] for image in coco['images']}
    per_image = Counter(annotation['image_id'] for annotation in coco['annotations'])
    counts = [per_image[image_id] for image_id in pixels]
    per_class = Counter(annotation['category_id'] for annotation in coco['annotations'])
    shares = [
        annotation['bbox'][2] * annotation['bbox'][3] / pixels[annotation['image_id']]
        for annotation in coco['annotations']
    ]
    p10, median, p90 = np.percentile(shares or [0.0], [10, 50, 90]).tolist()
    return {
        'images': len(counts),
        'boxes': len(shares),
        'boxes_per_image': {
            'mean': float(np.mean(counts)),
            'min': min(counts),
            'max': max(counts),
            'histogram': {str(count): n for count, n in sorted(Counter(counts).items())},
        },
        'classes': {category['name']: per_class[category['id']] for category in coco['categories']},
        'box_area': {
            'mean': float(np.mean(shares or [0.0])),
            'p10': p10,
            'median': median,
            'p90': p90,
        },
    }
