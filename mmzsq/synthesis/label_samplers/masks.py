# SPDX-License-Identifier: Apache-2.0
"""Instance masks of labels: plausible ones for boxes that have none, and masks carried to another resolution.

Objects fill their boxes to the edges only where they are rectangles; an ellipse is the plainest shape that touches all
four sides and leaves the corners to the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F


def ellipse_masks(bboxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Fill the ellipse inscribed in each box.

    Args:
        bboxes: Boxes (n, 4), xyxy in pixels.
        image_size: Height and width in pixels.

    Returns:
        Shape (n, H, W), bool: pixels whose center lies in the ellipse. Where there is none, as in a box of less than a
        pixel, the pixel at the box's center, so that no mask is empty.

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
    """Carry masks to another resolution with smooth outlines.

    Args:
        masks: Shape (n, H, W), bool.
        image_size: Height and width wanted, in pixels.

    Returns:
        Shape (n, *image_size), bool: pixels at least half covered, by bilinear interpolation. Of a mask that covers no
        pixel by half, the pixel that it covers most: only an empty mask comes back empty.
    """
    if len(masks) == 0:
        return masks.new_zeros((0, *image_size))
    # Antialiasing changes nothing where masks grow; where they shrink, it averages all pixels instead of picking four.
    cover = F.interpolate(masks[None].float(), image_size, mode='bilinear', antialias=True)[0]
    resized = cover >= 0.5
    most, place = cover.flatten(1).max(dim=1)
    lost = (most > 0) & (most < 0.5)
    resized.flatten(1)[lost, place[lost]] = True
    return resized


def mask_boxes(masks: Tensor) -> Tensor:
    """Bound each mask.

    Args:
        masks: Shape (n, H, W), bool.

    Returns:
        Boxes (n, 4), float32, xyxy in pixels, around the outer edges of the pixels; zeros for an empty mask.
    """
    edges = []
    for axis in (1, 2):
        # Which columns, then rows, hold a pixel of the mask.
        taken = masks.any(dim=axis).byte()
        first = taken.argmax(dim=1)
        last = taken.shape[1] - taken.flip(1).argmax(dim=1)
        edges.append(torch.stack([first, last]))
    (x1, x2), (y1, y2) = edges
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()
    return torch.where(masks.flatten(1).any(dim=1)[:, None], boxes, 0.0)


def fit_masks(labels: Sequence[InstanceData], image_size: tuple[int, int], needed: bool) -> list[InstanceData]:
    """Give labels the masks that a detector learns, or take away those that it does not.

    Args:
        labels: For images of ``image_size``; left as they are.
        image_size: Height and width in pixels.
        needed: Whether the detector learns masks.

    Returns:
        The labels: with their own masks, or else ellipses, if they are needed; without any if not.
    """
    fitted = []
    for instances in labels:
        new = instances.clone()
        if not needed:
            new.pop('masks', None)
        elif 'masks' not in instances:
            new.masks = ellipse_masks(instances.bboxes, image_size)
        fitted.append(new)
    return fitted
