# SPDX-License-Identifier: Apache-2.0
"""A detector of MMDetection with the test pipeline of its config: images in, detections out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample

from mmzsq.errors import UserError


class ImageDetector:
    """A detector with the test pipeline of a config.

    Args:
        detector: A detector of MMDetection, in eval mode.
        cfg: A config with ``test_dataloader``.

    Attributes:
        detector: The detector.
    """

    def __init__(self, detector: Any, cfg: Any) -> None:
        self.detector = detector
        self._load, self._loaded = pipelines_of(cfg)

    @torch.no_grad()
    def __call__(self, images: Sequence[str | Path | np.ndarray]) -> list[DetDataSample]:
        """Detect objects.

        Args:
            images: Paths, or arrays (H, W, 3) of uint8 in the order B, G, R, as OpenCV reads them.

        Returns:
            One data sample for each image; boxes are in pixels of the image as given.
        """
        results: list[DetDataSample] = []
        for image in images:
            data = self._prepare(image)
            results += self.detector.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))
        return results

    def _prepare(self, image: str | Path | np.ndarray) -> Any:
        if isinstance(image, np.ndarray):
            return self._loaded(dict(img=image, img_id=0))
        if not Path(image).is_file():
            raise UserError(f'{image} does not exist.')
        return self._load(dict(img_path=str(image), img_id=0))


def pipelines_of(cfg: Any) -> tuple[Compose, Compose]:
    """Build the test pipeline of a config without annotations.

    Args:
        cfg: A config with ``test_dataloader``.

    Returns:
        The pipeline for paths, and the one for images that are loaded.
    """
    dataset = cfg['test_dataloader']['dataset']
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    transforms = [copy.deepcopy(dict(t)) for t in dataset['pipeline']]
    kept = [t for t in transforms if not _name(t).startswith('LoadAnnotations')]
    loaded = [copy.deepcopy(t) for t in kept]
    # The first transform may read images from elsewhere, as that of drawn scenes does.
    if _name(kept[0]) == 'InferencerLoader':
        kept[0] = dict(type='LoadImageFromFile')
    loaded[0] = dict(type='mmdet.LoadImageFromNDArray')
    return _compose(kept), _compose(loaded)


def _name(transform: dict[str, Any]) -> str:
    kind = transform['type']
    return str(kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]


def _compose(transforms: list[dict[str, Any]]) -> Compose:
    return Compose([TRANSFORMS.build(transform) for transform in transforms])
