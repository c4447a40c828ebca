# SPDX-License-Identifier: Apache-2.0
"""Outlines of the shapes in procedural pictures."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator

_CIRCLE = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_PARTS = 3
"""Binary digits after the point of coordinates that OpenCV draws."""


def outline(rng: Generator) -> np.ndarray:
    """Draw the outline of a disc, box, polygon or blob.

    Args:
        rng: Source of randomness.

    Returns:
        Corners (n, 2) as x, y, with the origin inside of the shape and distances of at most about 1.
    """
    kind = rng.integers(5)
    if kind == 0:
        points = np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE)], 1)
    elif kind == 1:
        points = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
        if rng.random() < 0.4:
            # A box in perspective.
            points += rng.normal(0, 0.2, points.shape)
    elif kind == 2:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 11)))
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.35, 1, len(angles))[:, None]
    elif kind == 3:
        # A smooth radius: a Fourier series whose terms fall with the frequency.
        order = np.arange(1, 8)
        terms = rng.normal(0, 0.45, 7) / order * np.cos(order * _CIRCLE[:, None] + rng.uniform(0, 2 * np.pi, 7))
        radius = np.clip(0.65 + terms.sum(1), 0.15, 1.1)
        points = np.stack([np.cos(_CIRCLE), np.sin(_CIRCLE)], 1) * radius[:, None]
    else:
        # Symmetric, as faces, vehicles and furniture are.
        heights = np.linspace(-1, 1, rng.integers(4, 9))
        half = rng.uniform(0.15, 1, len(heights))
        points = np.concatenate([np.stack([half, heights], 1), np.stack([-half, heights], 1)[::-1]])
    return points * (1.0, rng.uniform(0.3, 1))


def place(points: np.ndarray, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Scale, rotate and move an outline.

    Args:
        points: Corners (n, 2).
        center: Position (2,) of the origin, x and y in pixels.
        radius: Factor, in pixels.
        angle: Rotation in radians.
    """
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]]) * radius + center


def fill(index_map: np.ndarray, points: np.ndarray, index: int) -> None:
    """Fill a polygon of an index map, in place.

    Args:
        index_map: (H, W), int32.
        points: Corners (n, 2), x and y in pixels.
        index: The value.
    """
    cv2.fillPoly(index_map, [_fixed_point(points)], index, shift=_PARTS)


def stroke(index_map: np.ndarray, points: np.ndarray, thickness: int, index: int) -> None:
    """Draw a line along points into an index map, in place; other arguments as of :func:`fill`.

    Args:
        index_map: (H, W), int32.
        points: Points (n, 2), x and y in pixels.
        thickness: Of the line, in pixels.
        index: The value.
    """
    cv2.polylines(index_map, [_fixed_point(points)], False, index, thickness, shift=_PARTS)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.round(points * 2**_PARTS).astype(np.int32)
