# SPDX-License-Identifier: Apache-2.0
"""A data set of drawn scenes for training and evaluation without a download.

Scenes are drawn on access. Every item holds its image in ``img``, so a pipeline starts with MMDetection's
``InferencerLoader``, which uses that image if present and otherwise reads a file. The same pipeline therefore works for
drawn scenes and for a calibration set on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from mmdet.datasets import BaseDetDataset

from mmzsq.datasets.shapes_drawing import CLASS_NAMES, draw_scene
from mmzsq.errors import UserError
from mmzsq.masks import encode_mask
from mmzsq.registry import DATASETS

_MIN_IMAGE_SIZE = 64


@DATASETS.register_module()
class ShapesDataset(BaseDetDataset):
    """``num_images`` consecutive scenes of an infinite series.

    The ground truth in ``instances`` describes the visible part of each figure: boxes in xyxy pixels, and masks as
    compressed run lengths. The image is (H, W, 3) uint8, BGR. Image ``i`` depends only on ``seed`` and ``start + i``,
    not on the worker that draws it.

    Args:
        num_images: Length of the data set.
        image_size: Side of the square images in pixels, at least 64.
        seed: Seed of the series.
        start: Index of the first scene. Splits with the same seed share no image if their ranges do not overlap.
        pipeline: Transforms, starting with ``dict(type='mmdet.InferencerLoader')``.
        test_mode: Whether the data set is used for evaluation.
        **kwargs: Further arguments of MMDetection's ``BaseDetDataset``, for example ``indices``.

    Raises:
        UserError: If a number is not an integer or out of range.

    Example:
        >>> dataset = ShapesDataset(num_images=2)
        >>> dataset[0]['img'].shape
        (256, 256, 3)
    """

    METAINFO = {
        'classes': CLASS_NAMES,
        'palette': [
            (220, 60, 60),
            (60, 140, 220),
            (80, 180, 80),
            (240, 170, 50),
            (160, 90, 200),
            (60, 190, 190),
            (230, 110, 180),
            (140, 110, 70),
        ],
    }

    def __init__(
        self,
        num_images: int,
        image_size: int = 256,
        seed: int = 0,
        start: int = 0,
        pipeline: Sequence[dict[str, Any] | Callable[..., Any]] = (),
        test_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        self.num_images = _checked('num_images', num_images, 1)
        self.image_size = _checked('image_size', image_size, _MIN_IMAGE_SIZE)
        self.seed = _checked('seed', seed, 0)
        self.start = _checked('start', start, 0)
        super().__init__(pipeline=list(pipeline), test_mode=test_mode, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the scenes without drawing any."""
        size = self.image_size
        return [{'img_id': i, 'scene': self.start + i, 'height': size, 'width': size} for i in range(self.num_images)]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Draw scene ``idx``.

        Args:
            idx: Position in the data set.

        Returns:
            ``img_id``, ``scene``, ``height``, ``width``, ``sample_idx``, ``img`` and ``instances``, each with ``bbox``,
            ``bbox_label``, ``ignore_flag`` and ``mask``.
        """
        info = super().get_data_info(idx)
        scene = draw_scene(self.seed, info['scene'], self.image_size)
        info['img'] = scene.image
        info['instances'] = [
            {'bbox': bbox, 'bbox_label': label, 'ignore_flag': 0, 'mask': encode_mask(mask)}
            for bbox, label, mask in zip(scene.bboxes.tolist(), scene.labels.tolist(), scene.masks, strict=True)
        ]
        return info


def _checked(name: str, value: int, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise UserError(f'ShapesDataset: {name} must be an integer of at least {minimum}, got {value!r}')
    return int(value)
