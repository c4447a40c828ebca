# SPDX-License-Identifier: Apache-2.0
"""Labels of real images, for comparison with label-free synthesis.

The paper guides synthesis by real labels in the "real label" rows of Table 5 and in all of Table 2. No pixel is read,
but such a run is not zero-shot. Its log and manifest say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.masks import decode_mask, ellipse_masks, resize_masks
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.annotation_files import RealObjects, read_coco, read_voc
from mmzsq.synthesis.label_samplers.base import LabelSampler, rescale_labels


@LABEL_SAMPLERS.register_module()
class RealLabelSampler(LabelSampler):
    """Gives each synthetic image the labels of a random real image; for comparison only.

    Each call draws images without replacement, and starts over when all are used. No state is kept between calls, so a
    shard of a calibration set does not depend on earlier shards. Labels are stretched to the image size. Boxes that
    become thinner than a pixel are dropped, and images without boxes are skipped. Crowds and objects marked as
    difficult or ignored are left out.

    Args:
        ann_file: For COCO, the annotation file. For VOC, a list of images such as ``'ImageSets/Main/trainval.txt'``, or
            None for all files in ``Annotations``.
        data_root: Folder that ``ann_file`` is relative to; for VOC, the folder with ``Annotations/*.xml``.
        format: ``'coco'`` or ``'voc'``.
        classes: Class names, in the order of the detector's labels; objects of other classes are left out. Required for
            VOC. For COCO, None uses all categories of the file, by ascending id.

    Raises:
        UserError: If an argument is missing or invalid, or a file is missing, damaged or in another format.
    """

    uses_real_labels = True

    def __init__(
        self,
        ann_file: str | None = None,
        data_root: str | None = None,
        format: str = 'coco',
        classes: Sequence[str] | None = None,
    ) -> None:
        for name, value in (('ann_file', ann_file), ('data_root', data_root)):
            if value is not None and not isinstance(value, (str, Path)):
                raise UserError(f'RealLabelSampler: {name} must be a path or None, got {value!r}')
        root = Path(data_root or '')
        if format == 'coco':
            if ann_file is None:
                raise UserError("RealLabelSampler: format='coco' needs ann_file, COCO's annotation file (JSON)")
            self.source = root / ann_file
            self.classes, self.images = read_coco(self.source, classes)
        elif format == 'voc':
            if data_root is None or classes is None:
                raise UserError(
                    "RealLabelSampler: format='voc' needs data_root, the folder with Annotations/*.xml, and classes, "
                    "the names in the order of the detector's labels"
                )
            self.source = root
            self.classes = list(classes)
            self.images = read_voc(root, classes, None if ann_file is None else root / ann_file)
        else:
            raise UserError(f"RealLabelSampler: format is 'coco' or 'voc', not {format!r}")

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw the labels of real images; see :meth:`LabelSampler.sample`.

        Returns:
            Labels, with ``masks`` if any object of the image has a segmentation; its other objects then get ellipses.

        Raises:
            UserError: If the number of classes differs from the detector's, or every object is smaller than a pixel.
        """
        if len(self.classes) != num_classes:
            raise UserError(
                f'RealLabelSampler: {self.source} is read with {len(self.classes)} classes, but the detector has '
                f"{num_classes}: set classes to the names of the detector's classes, in order"
            )
        return list(itertools.islice(self._draw(image_size, generator), num_images))

    def _draw(self, image_size: tuple[int, int], generator: torch.Generator) -> Iterator[InstanceData]:
        while True:
            drawn = 0
            for index in torch.randperm(len(self.images), generator=generator).tolist():
                labels = stretch_labels(self.images[index], image_size)
                if len(labels) > 0:
                    drawn += 1
                    yield labels
            if drawn == 0:
                raise UserError(
                    f'RealLabelSampler: no object of {self.source} is as large as a pixel of a {image_size[0]} x '
                    f'{image_size[1]} image: increase image_size of zsq.synthesis, or check the file'
                )


def stretch_labels(objects: RealObjects, image_size: tuple[int, int]) -> InstanceData:
    """Stretch the annotations of a real image to another image size.

    Args:
        objects: The annotations.
        image_size: New height and width in pixels.

    Returns:
        ``bboxes``, ``labels`` and, if any object has a segmentation, ``masks`` of the objects that are at least one
        pixel wide and high after stretching.
    """
    [labels] = rescale_labels(
        [InstanceData(bboxes=objects.bboxes, labels=objects.labels)], objects.image_size, image_size
    )
    large = (labels.bboxes[:, 2:] - labels.bboxes[:, :2] >= 1).all(dim=1)
    labels = labels[large]
    masks = [decode_mask(objects.segmentations[index], objects.image_size) for index in large.nonzero()[:, 0].tolist()]
    known = torch.tensor([mask is not None for mask in masks], dtype=torch.bool)
    if known.any():
        labels.masks = ellipse_masks(labels.bboxes, image_size)
        labels.masks[known] = resize_masks(torch.stack([mask for mask in masks if mask is not None]), image_size)
    return labels
