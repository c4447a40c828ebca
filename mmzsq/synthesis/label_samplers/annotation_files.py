# SPDX-License-Identifier: Apache-2.0
"""Readers for annotation files in COCO and Pascal VOC format. They never open an image."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import torch
from defusedxml import DTDForbidden, ElementTree
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from mmzsq.errors import UserError
from mmzsq.synthesis.coco_format import annotation_boxes, parse_coco

_CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')


@dataclass(frozen=True)
class RealObjects:
    """Annotations of one real image.

    Attributes:
        image_size: Height and width in pixels.
        bboxes: Boxes (n, 4), xyxy in pixels, inside the image; n is at least 1.
        labels: Class indices (n,).
        segmentations: COCO segmentation of each object; None for an object without one.
    """

    image_size: tuple[int, int]
    bboxes: Tensor
    labels: Tensor
    segmentations: list[Any]


def read_coco(path: Path, classes: Sequence[str] | None) -> tuple[list[str], list[RealObjects]]:
    """Read an annotation file in COCO format.

    Args:
        path: The JSON file.
        classes: Category names, in the order of the labels; None: all categories, by ascending id.

    Returns:
        The category names, and the annotations of each image with an object of these classes, in the order of the file.
        Crowds and ignored objects are left out.

    Raises:
        UserError: If the file is missing or not in COCO format, or if it lacks a class or has no object of the classes.
    """
    try:
        coco = parse_coco(_read(path))
        names = {index: coco.cats[index]['name'] for index in sorted(coco.cats)}
        if not all(isinstance(name, str) for name in names.values()):
            raise TypeError('names of categories must be text')
        classes = list(names.values()) if classes is None else list(classes)
        _check_classes(classes, list(names.values()), path)
        images = []
        for image_id, image in coco.imgs.items():
            annotations = [
                annotation
                for annotation in coco.imgToAnns[image_id]
                if names[annotation['category_id']] in classes
                and not annotation.get('iscrowd')
                and not annotation.get('ignore')
            ]
            image_size = (image['height'], image['width'])
            labels = [classes.index(names[annotation['category_id']]) for annotation in annotations]
            images.append(
                RealObjects(
                    image_size,
                    clip_boxes_to_image(annotation_boxes(annotations), image_size),
                    torch.tensor(labels, dtype=torch.long),
                    [annotation.get('segmentation') for annotation in annotations],
                )
            )
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'RealLabelSampler: {path} is not a COCO annotation file ({error!r})') from error
    return classes, _keep_with_objects(images, path)


def read_voc(root: Path, classes: Sequence[str], list_file: Path | None) -> list[RealObjects]:
    """Read annotations in Pascal VOC format.

    Args:
        root: Folder with ``Annotations/*.xml``.
        classes: Class names, in the order of the labels.
        list_file: Text file whose lines begin with the name of an image, without suffix; None: all images.

    Returns:
        The annotations of each image with an object of these classes, in the order of the list, or else sorted by file
        name. Coordinates start at 1 in the files and at 0 here, as in MMDetection. Objects marked as difficult are left
        out.

    Raises:
        UserError: If a file is missing or not in VOC format, or if a class has no object.
    """
    folder = root / 'Annotations'
    if list_file is not None:
        lines = _read(list_file).decode(errors='replace').splitlines()
        paths = [folder / f'{line.split()[0]}.xml' for line in lines if line.strip()]
    else:
        paths = sorted(folder.glob('*.xml'))
    images = []
    found: set[str] = set()
    for path in paths:
        content = _read(path)
        try:
            tree = parse_xml(content)
            image_size = (int(_text(tree, 'size/height')), int(_text(tree, 'size/width')))
            objects = [item for item in tree.findall('object') if item.findtext('difficult', '0').strip() != '1']
            found.update(_text(item, 'name') for item in objects)
            objects = [item for item in objects if _text(item, 'name') in classes]
            corners = [[float(_text(item, f'bndbox/{key}')) for key in _CORNERS] for item in objects]
        except ValueError as error:
            raise UserError(f'RealLabelSampler: {path} is not a Pascal VOC annotation ({error})') from error
        images.append(
            RealObjects(
                image_size,
                clip_boxes_to_image(torch.tensor(corners).view(-1, 4) - 1, image_size),
                torch.tensor([classes.index(_text(item, 'name')) for item in objects], dtype=torch.long),
                [None] * len(objects),
            )
        )
    _check_classes(classes, sorted(found), list_file or folder)
    return _keep_with_objects(images, list_file or folder)


def parse_xml(content: bytes) -> Element:
    """Parse an XML document that declares no document type.

    Entities, which a document type defines, can exhaust the memory or include other files.

    Args:
        content: The bytes of the file.

    Returns:
        The root element.

    Raises:
        ValueError: If the document is not well-formed or declares a document type.
    """
    try:
        return ElementTree.fromstring(content, forbid_dtd=True)
    except DTDForbidden as error:
        raise ValueError(f'it declares a document type, {error.name}') from error
    except ParseError as error:
        raise ValueError(str(error)) from error


def _text(element: Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f'{element.tag} lacks {path}')
    return text.strip()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f'RealLabelSampler: {path} cannot be read ({error.strerror}): give the path of an annotation file'
        ) from error


def _check_classes(classes: Sequence[str], known: Sequence[str], path: Path) -> None:
    for name in classes:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f'; did you mean {nearest[0]!r}?' if nearest else f'; it has {", ".join(known) or "no objects"}'
            raise UserError(f'RealLabelSampler: {path} has no object of class {name!r}{hint}')


def _keep_with_objects(images: list[RealObjects], path: Path) -> list[RealObjects]:
    images = [image for image in images if len(image.labels) > 0]
    if not images:
        raise UserError(f'RealLabelSampler: {path} has no object of the requested classes')
    return images
