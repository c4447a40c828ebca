# SPDX-License-Identifier: Apache-2.0
"""Labels of real images, for comparison: what synthesis gains when it is told what real scenes hold.

The paper's "real label" rows (its Table 5, and Table 2 as a whole) guide synthesis in this way. No pixel is read, but
such a run is not zero-shot, and its log and manifest say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.coco_format import read_mask
from mmzsq.synthesis.label_samplers.annotation_files import RealObjects, read_coco, read_voc
from mmzsq.synthesis.label_samplers.base import LabelSampler, rescale_labels
from mmzsq.synthesis.label_samplers.masks import ellipse_masks, resize_masks


@LABEL_SAMPLERS.register_module()
class RealLabelSampler(LabelSampler):
    """Draws labels of real images, each the labels of one image; for comparison only.

    Images are drawn without replacement until all are used up, then anew, within one call: a shard of a calibration set
    depends on nothing that was made before it. Labels are stretched to the size wanted; boxes that are then thinner
    than a pixel are dropped, images without boxes skipped. Crowds and what is marked difficult or to be ignored are
    left out.

    Args:
        ann_file: For COCO the annotation file. For VOC a list of images, such as
            ``'ImageSets/Main/trainval.txt'``, or None for all files in ``Annotations``.
        data_root: Folder that ``ann_file`` is relative to; for VOC the one with ``Annotations/*.xml``.
        format: ``'coco'`` or ``'voc'``.
        classes: Names in the order of the detector's labels; other objects are left out. Required for VOC; for COCO
            None takes all categories of the file, by rising id.

    Raises:
        UserError: If the arguments do not fit, or a file is missing, damaged or of another form.
    """

    uses_real_labels = True

    def __init__(
        self,
        ann_file: str | None = None,
        data_root: str | None = None,
        format: str = 'coco',
        classes: Sequence[str] | None = None,
    ) -> None:
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
            With ``masks`` where any object of the image has a segmentation; its other objects then get ellipses.

        Raises:
            UserError: If the classes are not as many as the detector's, or no object is as large as a pixel.
        """
        if len(self.classes) != num_classes:
            raise UserError(
                f'RealLabelSampler: {self.source} is read with {len(self.classes)} classes, the detector has '
                f'{num_classes}: name these, in their order, by classes'
            )
        return list(itertools.islice(self._draw(image_size, generator), num_images))

    def _draw(self, image_size: tuple[int, int], generator: torch.Generator) -> Iterator[InstanceData]:
        while True:
            drawn = 0
            for index in torch.randperm(len(self.images), generator=generator).tolist():
                labels = labels_at(self.images[index], image_size)
                if len(labels) > 0:
                    drawn += 1
                    yield labels
            if drawn == 0:
                raise UserError(
                    f'RealLabelSampler: no object of {self.source} is as large as a pixel of a {image_size[0]} x '
                    f'{image_size[1]} image: raise image_size of zsq.synthesis, or look whether the file is right'
                )


def labels_at(objects: RealObjects, image_size: tuple[int, int]) -> InstanceData:
    """Stretch what is annotated in a real image to another size.

    Args:
        objects: As they were read.
        image_size: Height and width wanted, in pixels.

    Returns:
        ``bboxes``, ``labels`` and perhaps ``masks`` of the objects that are then at least a pixel wide and high.
    """
    [labels] = rescale_labels(
        [InstanceData(bboxes=objects.bboxes, labels=objects.labels)], objects.image_size, image_size
    )
    large = (labels.bboxes[:, 2:] - labels.bboxes[:, :2] >= 1).all(dim=1)
    labels = labels[large]
    masks = [read_mask(objects.segmentations[index], objects.image_size) for index in large.nonzero()[:, 0].tolist()]
    known = torch.tensor([mask is not None for mask in masks], dtype=torch.bool)
    if known.any():
        labels.masks = ellipse_masks(labels.bboxes, image_size)
        labels.masks[known] = resize_masks(torch.stack([mask for mask in masks if mask is not None]), image_size)
    return labels
