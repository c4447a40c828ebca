# SPDX-License-Identifier: Apache-2.0
"""Matching of two lists of detections of one image."""

from __future__ import annotations

from collections.abc import Sequence

MIN_IOU = 0.5


def match(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Pair detections of one class that overlap, the best of ``one`` first, each with what it overlaps most.

    Args:
        one: Rows of x1, y1, x2, y2, score and label.
        other: Likewise.

    Returns:
        Pairs of a row of ``one`` and a row of ``other`` with an IoU of at least 0.5. No row is in two pairs.
    """
    left = list(range(len(other)))
    pairs = []
    for row in sorted(one, key=lambda row: -row[4]):
        overlaps = [(iou(row, other[index]), index) for index in left if other[index][5] == row[5]]
        best, index = max(overlaps, default=(0.0, -1))
        if best >= MIN_IOU:
            pairs.append((row, other[index]))
            left.remove(index)
    return pairs


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes, which begin with x1, y1, x2, y2."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0
