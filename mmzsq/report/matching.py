# SPDX-License-Identifier: Apache-2.0
"""Matching of two lists of boxes of one image."""

from __future__ import annotations

import numpy as np

MIN_IOU = 0.5


def match(one: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """Pair boxes of one class that overlap, the best of ``one`` first, each with what it overlaps most.

    Args:
        one: Rows of x1, y1, x2, y2, score and label, (n, 6).
        other: Likewise, (m, 6). Its scores are not used.

    Returns:
        Pairs of an index of ``one`` and an index of ``other`` whose IoU is at least 0.5. No index is in two pairs.
    """
    overlaps = iou(one, other) * (one[:, None, 5] == other[None, :, 5])
    overlaps[overlaps < MIN_IOU] = 0
    pairs = []
    for index in np.argsort(-one[:, 4], kind='stable').tolist():
        if overlaps[index].any():
            best = int(overlaps[index].argmax())
            pairs.append((index, best))
            overlaps[:, best] = 0
    return pairs


def iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boxes, whose rows begin with x1, y1, x2, y2.

    Args:
        one: Shape (n, 4 or more).
        other: Shape (m, 4 or more).

    Returns:
        Shape (n, m), 0 for a pair without an area.
    """
    inside = intersection(one, other)
    union = area(one)[:, None] + area(other) - inside
    return np.divide(inside, union, out=np.zeros(inside.shape), where=union > 0)


def intersection(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the areas that boxes (n, 4 or more) and (m, 4 or more) share, (n, m)."""
    corner = np.maximum(one[:, None, :2], other[:, :2])
    size = np.minimum(one[:, None, 2:4], other[:, 2:4]) - corner
    shared: np.ndarray = size.clip(min=0).prod(-1)
    return shared


def area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of boxes (n, 4 or more), (n,)."""
    size: np.ndarray = (boxes[:, 2:4] - boxes[:, :2]).prod(-1)
    return size
