# SPDX-License-Identifier: Apache-2.0
"""A calibration set as a data set of MMDetection."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mmcv.transforms import Compose, LoadImageFromFile
from mmdet.datasets import CocoDataset

from mmzsq.errors import UserError
from mmzsq.registry import DATASETS
from mmzsq.synthesis.calibration_set import CalibrationSet


@DATASETS.register_module()
class CalibrationDataset(CocoDataset):
    """Synthetic images and labels, read through a detector's own pipeline.

    The set's paths and class names come from the set itself. To decode a PNG of 640x640 pixels takes a core some ten
    milliseconds, to train on it a GPU three: images are decoded once, by all cores, into memory that the processes of a
    data loader share, where they are forked.

    Args:
        data_root: Directory of a complete calibration set.
        metainfo: Further meta information; ``classes``, if given, must be the set's.
        cache_gib: Of decoded images, all of them, that may be held in memory. A set that needs more is decoded image by
            image, as is one whose pipeline does not begin with ``LoadImageFromFile``; 0 always does.
        **kwargs: Any further argument of MMDetection's ``CocoDataset``, such as ``pipeline``.

    Raises:
        UserError: If there is no complete set, or of another format version, or of other classes.
    """

    METAINFO: dict[str, Any] = {}

    def __init__(
        self, data_root: str, metainfo: Mapping[str, Any] | None = None, cache_gib: float = 4.0, **kwargs: Any
    ) -> None:
        self.cache_gib = cache_gib
        self._images: np.ndarray | None = None
        classes = CalibrationSet.load(data_root).classes
        metainfo = dict(metainfo or {})
        if tuple(metainfo.setdefault('classes', classes)) != classes:
            raise UserError(
                f'metainfo names the classes {tuple(metainfo["classes"])}, the calibration set in '
                f'{data_root} has {classes}: leave them out, or make the set with this detector'
            )
        super().__init__(
            ann_file='annotations/instances.json',
            metainfo=metainfo,
            data_root=str(data_root),
            data_prefix={'img': 'images/'},
            **kwargs,
        )

    def full_init(self) -> None:
        """Read the annotations and, if there is room, the images."""
        if not self._fully_initialized:
            super().full_init()
            self._images = self._read_images()

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on one image and its labels."""
        if self._images is None:
            return super().prepare_data(idx)
        image = self._images[idx].copy()
        info = self.get_data_info(idx)
        info.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return Compose(self.pipeline.transforms[1:])(info)

    def _read_images(self) -> np.ndarray | None:
        """All images (N, H, W, 3) as the pipeline loads them; None where they are not to be held."""
        load: Any = next(iter(self.pipeline.transforms), None)
        if type(load) is not LoadImageFromFile or not len(self):
            return None

        def read(index: int) -> np.ndarray:
            return load.transform(self.get_data_info(index))['img']

        first = read(0)
        if first.nbytes * len(self) > self.cache_gib * 2**30:
            return None
        images = np.empty((len(self), *first.shape), first.dtype)

        def keep(index: int) -> None:
            images[index] = read(index)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None) as pool:
            list(pool.map(keep, range(len(self))))
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images behind: a process that is not forked reads its own files."""
        return dict(self.__dict__, _images=None)
