# SPDX-License-Identifier: Apache-2.0
"""Letterbox resizing as in YOLOv5: fit an image into a fixed size without changing its aspect ratio."""

from __future__ import annotations

from typing import Any

import mmcv
import numpy as np
from mmdet.datasets.transforms import Resize
from mmdet.structures.mask import BitmapMasks, PolygonMasks

from mmzsq.errors import UserError
from mmzsq.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LetterResize(Resize):
    """Resize an image to the largest size that fits a frame, and pad it evenly on both sides to fill the frame.

    Boxes, masks and the segmentation map are transformed accordingly. Adds ``pad_param``, the padding in pixels at the
    top, bottom, left and right. ``scale_factor`` (width, height) describes only the resize: a point of the original
    image moves to ``point * scale_factor + (left, top)``.

    Args:
        scale: Width and height of the frame in pixels.
        pad_val: Padding value of every channel, in [0, 255].
        seg_pad_val: Padding value of the segmentation map.
        **kwargs: ``clip_object_border``, ``backend`` and ``interpolation`` of
            :class:`~mmdet.datasets.transforms.Resize`.

    Raises:
        UserError: If ``scale`` is not two positive numbers.
    """

    def __init__(self, scale: tuple[int, int], pad_val: int = 114, seg_pad_val: int = 255, **kwargs: Any) -> None:
        if not isinstance(scale, tuple | list) or len(scale) != 2 or min(scale) < 1:
            raise UserError(f'LetterResize.scale must be (width, height) in pixels, not {scale!r}')
        super().__init__(scale=tuple(scale), keep_ratio=False, **kwargs)
        self.pad_val = pad_val
        self.seg_pad_val = seg_pad_val

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize and pad an image and its annotations.

        Args:
            results: ``img`` (H, W, 3) and optionally ``gt_bboxes``, ``gt_masks`` and ``gt_seg_map``, in pixels of
                ``img``.

        Returns:
            ``results``, updated.
        """
        results = super().transform(results)
        height, width = results['img_shape']
        # An odd pixel is added at the bottom and on the right.
        top, left = (self.scale[1] - height) // 2, (self.scale[0] - width) // 2
        bottom, right = self.scale[1] - height - top, self.scale[0] - width - left
        self._pad(results, (top, bottom, left, right))
        results['scale'] = self.scale
        results['keep_ratio'] = True
        return results

    def _resize_img(self, results: dict[str, Any]) -> None:
        """Resize to the largest size that fits the frame."""
        height, width = results['img'].shape[:2]
        factor = min(self.scale[0] / width, self.scale[1] / height)
        results['scale'] = (max(round(width * factor), 1), max(round(height * factor), 1))
        super()._resize_img(results)

    def _pad(self, results: dict[str, Any], padding: tuple[int, int, int, int]) -> None:
        """Pad all entries of ``results`` by (top, bottom, left, right) pixels."""
        top, bottom, left, right = padding
        sides = (left, top, right, bottom)
        # OpenCV would use a single number for the first channel only.
        pad_val = (self.pad_val,) * results['img'].shape[2]
        results['img'] = mmcv.impad(results['img'], padding=sides, pad_val=pad_val)
        results['img_shape'] = results['pad_shape'] = results['img'].shape[:2]
        results['pad_param'] = padding
        if results.get('gt_bboxes') is not None:
            results['gt_bboxes'].translate_((left, top))
        if results.get('gt_masks') is not None:
            results['gt_masks'] = _pad_masks(results['gt_masks'], padding)
        if results.get('gt_seg_map') is not None:
            results['gt_seg_map'] = mmcv.impad(results['gt_seg_map'], padding=sides, pad_val=self.seg_pad_val)
        shift = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], dtype=np.float32)
        results['homography_matrix'] = shift @ results['homography_matrix']

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(scale={self.scale}, pad_val={self.pad_val}, interpolation={self.interpolation!r})'
        )


def _pad_masks(masks: BitmapMasks | PolygonMasks, padding: tuple[int, int, int, int]) -> BitmapMasks | PolygonMasks:
    """Pad masks with background by (top, bottom, left, right) pixels."""
    top, bottom, left, right = padding
    size = (masks.height + top + bottom, masks.width + left + right)
    if isinstance(masks, BitmapMasks):
        return BitmapMasks(np.pad(masks.masks, ((0, 0), (top, bottom), (left, right))), *size)
    return masks.translate(size, left, 'horizontal').translate(size, top, 'vertical')
