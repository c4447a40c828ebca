# SPDX-License-Identifier: Apache-2.0
"""What real images hold, read from annotation files of COCO's and Pascal VOC's form, without their pixels."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from mmzsq.errors import UserError

_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


@dataclass(frozen=True)
class RealObjects:
    """What is annotated in one real image.

    Attributes:
        image_size: Height and width in pixels.
        bboxes: Boxes (n, 4), xyxy in pixels, inside the image; n is at least 1.
        labels: Class indices (n,).
        segmentations: COCO's, of each object; None where there is none.
    """

    image_size: tuple[int, int]
    bboxes: Tensor
    labels: Tensor
    segmentations: list[Any]


def read_coco(path: Path, classes: Sequence[str] | None) -> tuple[list[str], list[RealObjects]]:
    """Read an annotation file of COCO's form.

    Args:
        path: The JSON file.
        classes: Names of categories, in the order of the labels; None: all, by rising id.

    Returns:
        The names, and what is annotated in each image that has an object of these classes, in the order of the file.

    Raises:
        UserError: If there is no such file, it is of another form, or it lacks a class or any object.
    """
    try:
        coco = json.loads(_read(path))
        names = {category['id']: category['name'] for category in sorted(coco['categories'], key=lambda c: c['id'])}
        classes = list(names.values()) if classes is None else list(classes)
        _refuse_unknown(classes, list(names.values()), path)
        found: dict[Any, list[dict[str, Any]]] = {image['id']: [] for image in coco['images']}
        for annotation in coco['annotations']:
            wanted = names[annotation['category_id']] in classes
            if wanted and not annotation.get('iscrowd') and not annotation.get('ignore'):
                found[annotation['image_id']].append(annotation)
        images = []
        for image in coco['images']:
            annotations = found[image['id']]
            bboxes = torch.tensor([a['bbox'] for a in annotations], dtype=torch.float32).view(len(annotations), 4)
            bboxes[:, 2:] += bboxes[:, :2]
            images.append(
                RealObjects(
                    (image['height'], image['width']),
                    clip_boxes_to_image(bboxes, (image['height'], image['width'])),
                    torch.tensor([classes.index(names[a['category_id']]) for a in annotations], dtype=torch.long),
                    [annotation.get('segmentation') for annotation in annotations],
                )
            )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'RealLabelSampler: {path} is no annotation file of COCO ({error!r})') from error
    return classes, _with_objects(images, path)


def read_voc(root: Path, classes: Sequence[str], list_file: Path | None) -> list[RealObjects]:
    """Read annotations of Pascal VOC's form.

    Args:
        root: Folder with ``Annotations/*.xml``.
        classes: Names, in the order of the labels.
        list_file: Text file with the name of one image, less its suffix, at the start of each line; None: all.

    Returns:
        What is annotated in each image that has an object of these classes, in the order of the list or of the names.
        Coordinates count from 1 in the files and from 0 here, as MMDetection reads them.

    Raises:
        UserError: If a file is missing or of another form, or none has an object of some class.
    """
    folder = root / 'Annotations'
    if list_file is not None:
        lines = _read(list_file).decode(errors='replace').splitlines()
        paths = [folder / f'{line.split()[0]}.xml' for line in lines if line.strip()]
    else:
        paths = sorted(folder.glob('*.xml'))
    images = []
    seen: set[str] = set()
    for path in paths:
        text = _read(path)
        try:
            tree = parse_xml(text)
            image_size = (int(_text(tree, 'size/height')), int(_text(tree, 'size/width')))
            objects = [item for item in tree.findall('object') if item.findtext('difficult', '0').strip() != '1']
            seen.update(_text(item, 'name') for item in objects)
            objects = [item for item in objects if _text(item, 'name') in classes]
            corners = [[float(_text(item, f'bndbox/{key}')) for key in _CORNERS] for item in objects]
        except (expat.ExpatError, ValueError) as error:
            raise UserError(f'RealLabelSampler: {path} is no annotation of Pascal VOC ({error})') from error
        images.append(
            RealObjects(
                image_size,
                clip_boxes_to_image(torch.tensor(corners).view(-1, 4) - 1, image_size),
                torch.tensor([classes.index(_text(item, 'name')) for item in objects], dtype=torch.long),
                [None] * len(objects),
            )
        )
    _refuse_unknown(classes, sorted(seen), list_file or folder)
    return _with_objects(images, list_file or folder)


def parse_xml(text: bytes) -> Element:
    """Parse a document that defines no entities: those are how XML is made to eat memory or to read other files."""

    def refuse(name: str, *_: Any) -> None:
        raise ValueError(f'it has a document type, {name}')

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(text, True)
    return builder.close()


def _text(element: Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f'{element.tag} lacks {path}')
    return text.strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'RealLabelSampler: {path} cannot be read ({error.strerror})') from error


def _refuse_unknown(classes: Sequence[str], known: Sequence[str], path: Path) -> None:
    for name in classes:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean {nearest[0]!r}?' if nearest else f'; it has {", ".join(known) or "no objects"}'
            raise UserError(f'RealLabelSampler: nothing in {path} is of class {name!r}{hint}')


def _with_objects(images: list[RealObjects], path: Path) -> list[RealObjects]:
    images = [image for image in images if len(image.labels) > 0]
    if not images:
        raise UserError(f'RealLabelSampler: {path} has no object of the classes wanted')
    return images
