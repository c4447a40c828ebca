# SPDX-License-Identifier: Apache-2.0
"""Convert the annotations of a data set in Pascal VOC layout to COCO JSON, optionally with masks.

    python tools/dataset_converters/voc_to_coco.py data/bccd --splits trainval test --classes RBC WBC Platelets \
        --masks ellipse

This reads ``ROOT/ImageSets/Main/SPLIT.txt`` and ``ROOT/Annotations/*.xml``, and writes ``ROOT/annotations/SPLIT.json``.
VOC has no instance masks. ``--masks ellipse`` inscribes an ellipse in each box, which approximates blood cells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from mmzsq import cli
from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.errors import UserError
from mmzsq.synthesis.label_samplers.annotation_files import parse_xml

VERTICES = 32
"""Vertices of the polygon that approximates an ellipse; its area is 0.6 % smaller."""


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('root', type=Path, help='folder with Annotations/ and ImageSets/Main/')
    parser.add_argument('--splits', nargs='+', required=True, help='names of files in ImageSets/Main, without .txt')
    parser.add_argument('--classes', nargs='+', required=True, help='names of the classes, in the order of the labels')
    parser.add_argument('--masks', choices=['none', 'ellipse'], default='none', help='(default: none)')
    parser.add_argument('--out', type=Path, help='folder of the JSON files (default: ROOT/annotations)')
    args = parser.parse_args()
    out = args.out or args.root / 'annotations'
    # Before anything is written.
    contents = {split: convert(args.root, split, args.classes, args.masks == 'ellipse') for split in args.splits}
    make_directory(out)
    for split, coco in contents.items():
        write_atomically(out / f'{split}.json', json.dumps(coco).encode())
        sys.stdout.write(f'{out / f"{split}.json"}: {len(coco["images"])} images, {len(coco["annotations"])} boxes\n')


def convert(root: Path, split: str, classes: Sequence[str], ellipses: bool) -> dict[str, Any]:
    """Read one split.

    Args:
        root: Folder of the data set.
        split: Name of its list of images.
        classes: Class names in the order of the labels.
        ellipses: Whether to add an inscribed ellipse to each box as its mask.

    Returns:
        Content of a COCO annotation file; ``file_name`` is relative to ``JPEGImages``.

    Raises:
        UserError: If a file is missing or damaged, or has an object of another class.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name in _read(root / 'ImageSets' / 'Main' / f'{split}.txt').decode().split():
        path = root / 'Annotations' / f'{name}.xml'
        try:
            tree = parse_xml(_read(path))
            size = {side: int(_text(tree, f'size/{side}')) for side in ('width', 'height')}
            objects = [_object(node) for node in tree.iter('object')]
        except ValueError as error:
            raise UserError(
                f'{path} is not a Pascal VOC annotation: {error}. Correct the file, or drop its name from the split'
            ) from error
        images.append(dict(id=len(images) + 1, file_name=f'{name}.jpg', **size))
        for label, difficult, (x1, y1, x2, y2) in objects:
            if label not in classes:
                raise UserError(f'{path} has an object of class {label!r}: add it to --classes {" ".join(classes)}')
            if x2 <= x1 or y2 <= y1:
                continue
            annotation = dict(
                id=len(annotations) + 1,
                image_id=len(images),
                category_id=classes.index(label) + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1),
                iscrowd=int(difficult),
            )
            if ellipses:
                annotation['segmentation'] = [inscribed_ellipse(x1, y1, x2, y2)]
                annotation['area'] = round(math.pi / 4 * (x2 - x1) * (y2 - y1), 2)
            annotations.append(annotation)
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(classes)]
    return dict(images=images, annotations=annotations, categories=categories)


def inscribed_ellipse(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """Return a polygon ``[x, y, x, y, ...]`` on the ellipse inscribed in a box, in the unit of the box."""
    polygon = []
    for vertex in range(VERTICES):
        angle = 2 * math.pi * vertex / VERTICES
        x = (x1 + x2 + (x2 - x1) * math.cos(angle)) / 2
        y = (y1 + y2 + (y2 - y1) * math.sin(angle)) / 2
        polygon += [round(x, 2), round(y, 2)]
    return polygon


def _object(node: Element) -> tuple[str, bool, tuple[float, float, float, float]]:
    """Return class, whether it is difficult, and box in xyxy pixels from 0 (VOC counts pixels from 1)."""
    x1, y1, x2, y2 = (float(_text(node, f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
    return _text(node, 'name'), node.findtext('difficult') == '1', (x1 - 1, y1 - 1, x2 - 1, y2 - 1)


def _text(node: Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f'{path} is missing')
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): give the folder of a data set in VOC layout'
        ) from error


if __name__ == '__main__':
    cli.run(main)
