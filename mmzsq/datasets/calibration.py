# SPDX-License-Identifier: Apache-2.0
"""A calibration set as a data set for MMDetection."""

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

MAX_CACHED_BYTES = 4 * 2**30
"""Largest total size of decoded images that is held in memory."""


@DATASETS.register_module()
class CalibrationDataset(CocoDataset):
    """Synthetic images and labels, read through a detector's own pipeline.

    The calibration set provides paths and class names. Decoding a PNG of 640x640 pixels takes about ten milliseconds on
    one core, and training on it takes about three on a GPU. Images are therefore decoded once, on all cores, into
    memory that forked worker processes of a data loader share. Images are instead decoded on each access if they exceed
    :data:`MAX_CACHED_BYTES` in total, or if the pipeline does not begin with ``LoadImageFromFile``.

    Args:
        data_root: Directory of a complete calibration set.
        metainfo: Further meta information; ``classes``, if given, must match the set.
        **kwargs: Further arguments of MMDetection's ``CocoDataset``, such as ``pipeline``.

    Raises:
        UserError: If there is no complete set, or if it has another format version or other classes.
    """

    METAINFO: dict[str, Any] = {}

    def __init__(self, data_root: str, metainfo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._images: np.ndarray | None = None
        classes = CalibrationSet.load(data_root).classes
        metainfo = dict(metainfo or {})
        if tuple(metainfo.setdefault('classes', classes)) != classes:
            raise UserError(
                f'metainfo has the classes {tuple(metainfo["classes"])}, but the calibration set in {data_root} has '
                f'{classes}: remove classes from metainfo, or generate the set with this detector'
            )
        super().__init__(
            ann_file='annotations/instances.json',
            metainfo=metainfo,
            data_root=str(data_root),
            data_prefix={'img': 'images/'},
            **kwargs,
        )

    def full_init(self) -> None:
        """Read the annotations and, if they fit into the cache, the images."""
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
        """Return all images (N, H, W, 3) as loaded by the pipeline; None if they are not to be cached."""
        load: Any = next(iter(self.pipeline.transforms), None)
        if type(load) is not LoadImageFromFile or not len(self):
            return None

        def read(index: int) -> np.ndarray:
            return load.transform(self.get_data_info(index))['img']

        first = read(0)
        if first.nbytes * len(self) > MAX_CACHED_BYTES:
            return None
        images = np.empty((len(self), *first.shape), first.dtype)

        def store(index: int) -> None:
            images[index] = read(index)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else None) as pool:
            list(pool.map(store, range(len(self))))
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Drop the cached images: processes that are not forked decode images themselves."""
        return dict(self.__dict__, _images=None)
