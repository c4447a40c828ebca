# SPDX-License-Identifier: Apache-2.0
"""Classes and sizes of the boxes of a calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmzsq.synthesis.coco_format import annotation_boxes, parse_coco


def set_labels(root: str | Path) -> dict[str, Any]:
    """Count the classes of a calibration set, and list the relative sizes of its boxes.

    Args:
        root: Folder of a complete set.
    """
    coco = parse_coco((Path(root) / 'annotations' / 'instances.json').read_bytes())
    index = {category: position for position, category in enumerate(coco.cats)}
    counts, sizes = [0] * len(index), []
    for image_id, image in coco.imgs.items():
        annotations = coco.imgToAnns[image_id]
        for annotation, bbox in zip(annotations, annotation_boxes(annotations).tolist(), strict=True):
            counts[index[annotation['category_id']]] += 1
            sizes.append(relative_size(bbox, image['height'], image['width']))
    names = [category['name'] for category in coco.cats.values()]
    return dict(images=len(coco.imgs), counts=counts, sizes=sizes, classes=names)


def relative_size(bbox: Sequence[float], height: float, width: float) -> float:
    """Return the root of the share of an image that a box xyxy covers."""
    area = max(bbox[2] - bbox[0], 0) * max(bbox[3] - bbox[1], 0) / (height * width)
    return round(float(area) ** 0.5, 4)
