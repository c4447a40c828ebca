# SPDX-License-Identifier: Apache-2.0
"""Instance masks as tensors: COCO encoding, resizing, bounding boxes, and ellipses for boxes without a mask.

Without a mask, an object is drawn as the ellipse inscribed in its box. Only rectangles fill their boxes; an ellipse is
the simplest shape that touches all four sides and leaves the corners to the background.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F


def ellipse_masks(bboxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Fill the ellipse inscribed in each box.

    Args:
        bboxes: Boxes (n, 4), xyxy in pixels.
        image_size: Height and width in pixels.

    Returns:
        Shape (n, H, W), bool: true for pixels whose center lies in the ellipse. If there are none, as in a box smaller
        than a pixel, the pixel at the center of the box is set, so no mask is empty.

    Example:
        >>> ellipse_masks(torch.tensor([[0.0, 0.0, 4.0, 3.0]]), (3, 5)).int()
        tensor([[[0, 1, 1, 0, 0],
                 [1, 1, 1, 1, 0],
                 [0, 1, 1, 0, 0]]], dtype=torch.int32)
    """
    height, width = image_size
    center = (bboxes[:, :2] + bboxes[:, 2:]) / 2
    radius = ((bboxes[:, 2:] - bboxes[:, :2]) / 2).clamp(min=1e-6)
    x = ((torch.arange(width) + 0.5 - center[:, :1]) / radius[:, :1]) ** 2
    y = ((torch.arange(height) + 0.5 - center[:, 1:]) / radius[:, 1:]) ** 2
    masks = y[:, :, None] + x[:, None, :] <= 1
    column, row = (center[:, axis].floor().long().clamp(0, size - 1) for axis, size in ((0, width), (1, height)))
    masks[torch.arange(len(masks)), row, column] |= ~masks.flatten(1).any(dim=1)
    return masks


def resize_masks(masks: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Resize masks by antialiased bilinear interpolation.

    Args:
        masks: Shape (n, H, W), bool.
        image_size: New height and width in pixels.

    Returns:
        Shape (n, *image_size), bool: true for pixels that are at least half covered. If a mask covers no pixel by half,
        the pixel that it covers most is set, so only empty masks become empty masks.
    """
    if len(masks) == 0:
        return masks.new_zeros((0, *image_size))
    # When a mask shrinks, antialiasing averages all of its pixels instead of picking four. It has no effect otherwise.
    cover = F.interpolate(masks[None].float(), image_size, mode='bilinear', antialias=True)[0]
    resized = cover >= 0.5
    most, place = cover.flatten(1).max(dim=1)
    lost = (most > 0) & (most < 0.5)
    resized.flatten(1)[lost, place[lost]] = True
    return resized


def mask_boxes(masks: Tensor) -> Tensor:
    """Compute the bounding box of each mask.

    Args:
        masks: Shape (n, H, W), bool.

    Returns:
        Boxes (n, 4), float32, xyxy in pixels, around the outer edges of the pixels; zeros for an empty mask.
    """
    edges = []
    for axis in (1, 2):
        # Columns, then rows, that hold a pixel of the mask.
        occupied = masks.any(dim=axis).byte()
        first = occupied.argmax(dim=1)
        last = occupied.shape[1] - occupied.flip(1).argmax(dim=1)
        edges.append(torch.stack([first, last]))
    (x1, x2), (y1, y2) = edges
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()
    return torch.where(masks.flatten(1).any(dim=1)[:, None], boxes, 0.0)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask as a COCO ``segmentation``.

    Args:
        mask: Shape (H, W), bool.

    Returns:
        Compressed run lengths: ``size``, and ``counts`` as text, ready for JSON.
    """
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': encoded['size'], 'counts': encoded['counts'].decode('ascii')}


def decode_mask(segmentation: Any, image_size: tuple[int, int]) -> Tensor | None:
    """Decode the COCO ``segmentation`` of one annotation.

    Args:
        segmentation: Polygons (lists of x, y, x, y, ... in pixels), run lengths (compressed or not), or None.
        image_size: Height and width of the image in pixels.

    Returns:
        Shape (H, W), bool; None if there is no segmentation or it covers no pixel.
    """
    if isinstance(segmentation, list):
        # A polygon needs at least three points.
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not segmentation:
        return None
    if isinstance(segmentation, list) or isinstance(segmentation['counts'], list):
        segmentation = coco_mask.frPyObjects(segmentation, *image_size)
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(segmentation)
    mask = torch.from_numpy(coco_mask.decode(segmentation)).bool()
    return mask if mask.any() else None
