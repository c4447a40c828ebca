# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes of labeled figures for object detection.

A scene is a textured background under layers in random order. Some layers are figures of the eight classes; the others
are unlabeled clutter (blobs, splinters, lines, specks). Masks exclude the pixels that later layers cover, and a figure
loses its label if too little of it remains visible. Classes differ in shape or texture, never in color. Scene ``index``
of the infinite series ``seed`` depends on these two numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

CLASS_NAMES = ('disc', 'ring', 'box', 'triangle', 'star', 'cross', 'crescent', 'stripes')
CLASS_FREQUENCIES = (0.23, 0.18, 0.15, 0.13, 0.11, 0.09, 0.06, 0.05)
# Frequencies of 1, 2, ... figures in a scene.
COUNT_FREQUENCIES = (0.10, 0.16, 0.18, 0.17, 0.14, 0.11, 0.08, 0.06)
SIZE_RANGE = (0.07, 0.6)  # Diameter of the circle around a figure, as a fraction of the image side.
MIN_VISIBLE = 0.35  # Visible fraction of a figure's area below which it loses its label.

_SUBPIXEL_BITS = 4
_MIN_CONTRAST = 45.0  # Mean over B, G and R, in [0, 255].

Contours = list[NDArray[np.float64]]
Image = NDArray[Any]


@dataclass(frozen=True)
class Scene:
    """A drawn image with its ground truth.

    Attributes:
        image: (H, W, 3) uint8, BGR as OpenCV reads it.
        labels: (n,) int64, indices into ``CLASS_NAMES``; n >= 1.
        bboxes: (n, 4) float32 xyxy pixels, tight around the visible part.
        masks: (n, H, W) bool, the visible part.
    """

    image: Image
    labels: NDArray[np.int64]
    bboxes: NDArray[np.float32]
    masks: NDArray[np.bool_]


def draw_scene(seed: int, index: int, image_size: int = 256) -> Scene:
    """Draw one scene.

    Args:
        seed: Seed of the series, >= 0.
        index: Index of the scene in the series, >= 0.
        image_size: Side of the square image in pixels.

    Returns:
        The scene, with at least one labeled figure. The same arguments give the same bits with the same versions of
        NumPy and OpenCV.
    """
    rng = np.random.default_rng([seed, index])
    while True:
        scene = _draw_scene(rng, image_size)
        if len(scene.labels):
            return scene


def _draw_scene(rng: Generator, image_size: int) -> Scene:
    image = _background(rng, image_size)
    owner = np.full((image_size, image_size), -1, np.int16)
    count = 1 + rng.choice(len(COUNT_FREQUENCIES), p=COUNT_FREQUENCIES)
    layers = [int(label) for label in rng.choice(len(CLASS_NAMES), size=count, p=CLASS_FREQUENCIES)]
    layers += [-1] * int(rng.integers(2, 9))
    rng.shuffle(layers)

    full_areas = []
    for position, label in enumerate(layers):
        if label < 0:
            contours, size = _CLUTTER[rng.integers(len(_CLUTTER))](rng)
            striped = rng.random() < 0.1
        else:
            contours = _FIGURES[CLASS_NAMES[label]](rng)
            size = float(np.exp(rng.uniform(*np.log(SIZE_RANGE))))
            striped = CLASS_NAMES[label] == 'stripes'
        alpha, left, top, angle = _rasterize(rng, contours, size * image_size, image_size)
        full_areas.append(np.count_nonzero(alpha > 127))
        _paint(rng, image, owner, alpha, (left, top), angle if striped else None, position)

    image = _expose(rng, image)
    labels, bboxes, masks = [], [], []
    for position, label in enumerate(layers):
        if label < 0:
            continue
        mask = owner == position
        if np.count_nonzero(mask) < MIN_VISIBLE * full_areas[position]:
            continue
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        labels.append(label)
        bboxes.append((x, y, x + width, y + height))
        masks.append(mask)
    return Scene(
        image=image,
        labels=np.array(labels, np.int64),
        bboxes=np.array(bboxes, np.float32).reshape(-1, 4),
        masks=np.array(masks, bool).reshape(-1, image_size, image_size),
    )


def _rasterize(rng: Generator, contours: Contours, size: float, image_size: int) -> tuple[Image, int, int, float]:
    """Rotate, scale and place contours in [-1, 1] at random.

    Returns:
        Coverage (h, w), uint8; left and top edge in pixels; angle in radians.
    """
    angle = float(rng.uniform(0, 2 * np.pi))
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]]) * (size / 2)
    turned = [contour @ rotation for contour in contours]
    low = np.min([contour.min(axis=0) for contour in turned], axis=0)
    high = np.max([contour.max(axis=0) for contour in turned], axis=0)
    reach = np.minimum((high - low) * 0.3, image_size / 2)
    center = rng.uniform(reach, image_size - reach)
    origin = np.floor(center - (high - low) / 2).astype(int) - 1
    shift = center - (high + low) / 2 - origin
    width, height = (np.ceil(high - low).astype(int) + 3).tolist()
    alpha = np.zeros((height, width), np.uint8)
    fixed = [np.round((c + shift) * (1 << _SUBPIXEL_BITS)).astype(np.int32) for c in turned]
    cv2.fillPoly(alpha, fixed, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return alpha, int(origin[0]), int(origin[1]), angle


def _paint(
    rng: Generator,
    image: Image,
    owner: NDArray[np.int16],
    alpha: Image,
    origin: tuple[int, int],
    stripe_angle: float | None,
    position: int,
) -> None:
    """Draw one layer on the image in place, shaded in one hue, or in stripes of two colors."""
    left, top = origin
    size = image.shape[0]
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + alpha.shape[1], size), min(top + alpha.shape[0], size)
    if x2 <= x1 or y2 <= y1:
        return
    alpha = alpha[y1 - top : y2 - top, x1 - left : x2 - left]
    region = image[y1:y2, x1:x2]
    height, width = alpha.shape

    color = _contrasting_color(rng, np.array(cv2.mean(region)[:3]))
    surface = _shaded(rng, color, height, width)
    if stripe_angle is not None:
        other = _shaded(rng, _contrasting_color(rng, color), height, width)
        bands = _stripes(rng, stripe_angle, height, width)
        surface = np.where(bands[..., None], other, surface)
    weight = alpha.astype(np.float32) * (1 / 255)
    image[y1:y2, x1:x2] = cv2.blendLinear(surface, region.copy(), weight, 1 - weight)
    owner[y1:y2, x1:x2][alpha > 127] = position


def _contrasting_color(rng: Generator, against: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw a random BGR color in [0, 255] that contrasts with another one."""
    while True:
        color = rng.uniform(10, 245, 3)
        if np.abs(color - against).mean() > _MIN_CONTRAST:
            return color


def _shaded(rng: Generator, color: NDArray[np.float64], height: int, width: int) -> Image:
    """Interpolate random brightness between the four corners; (h, w, 3) uint8."""
    corners = color * rng.uniform(0.7, 1.15, (2, 2, 1))
    return cv2.resize(corners.clip(0, 255).astype(np.uint8), (width, height))


def _stripes(rng: Generator, angle: float, height: int, width: int) -> NDArray[np.bool_]:
    """Draw three to four pairs of bands across the first axis of the figure; (h, w) bool."""
    period = min(height, width) / rng.uniform(2.6, 4.0)
    ramp_y = np.arange(height, dtype=np.float32) * np.float32(np.sin(angle) / period)
    ramp_x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle) / period)
    ramp = ramp_y[:, None] + ramp_x + np.float32(rng.random())
    return (ramp - np.floor(ramp)) < 0.5


def _background(rng: Generator, size: int) -> Image:
    """Draw a gradient of muted colors under clouds or tiles; (size, size, 3) uint8."""
    base = rng.uniform(50, 205) + rng.uniform(-45, 45, 3)
    light = rng.uniform(-35, 35, (3, 3, 1)) + rng.uniform(-20, 20, (3, 3, 3))
    coarse = (base + light).clip(0, 255).astype(np.uint8)
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    rows = int(rng.integers(4, 40))
    columns = int(rows * rng.uniform(0.5, 2))
    patches = rng.integers(0, 256, (rows, columns), np.uint8)
    method = cv2.INTER_CUBIC if rng.random() < 0.6 else cv2.INTER_NEAREST
    patches = cv2.resize(patches, (size, size), interpolation=method)
    tint = rng.uniform(0.05, 0.3) * rng.uniform(0.5, 1.0, 3)
    tinted = cv2.merge([cv2.convertScaleAbs(patches, alpha=float(weight)) for weight in tint])
    return cv2.addWeighted(image, 1.0, tinted, 1.0, float(-128 * tint.mean()))


def _expose(rng: Generator, image: Image) -> Image:
    """Simulate a camera: blur in some images, and noise in all."""
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.0)) * image.shape[0] / 256)
    grain = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape)
    amount = float(rng.uniform(0.02, 0.2))
    return cv2.addWeighted(image, 1.0, grain, amount, -128 * amount)


def _arc(start: float, stop: float, radius: float = 1.0, points: int = 40) -> NDArray[np.float64]:
    """Return (points, 2) on a circle around zero; angles in radians."""
    angles = np.linspace(start, stop, points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


def _rectangle(half_width: float, half_height: float) -> NDArray[np.float64]:
    """Return the (4, 2) corners of a rectangle around zero."""
    return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (half_width, half_height)


def _disc(rng: Generator) -> Contours:
    return [_arc(0, 2 * np.pi) * (1.0, rng.uniform(0.8, 1.0))]


def _ring(rng: Generator) -> Contours:
    return [*_disc(rng), _arc(0, 2 * np.pi, rng.uniform(0.42, 0.6))]


def _box(rng: Generator) -> Contours:
    return [_rectangle(0.8, 0.8 * rng.uniform(0.6, 1.0))]


def _triangle(rng: Generator) -> Contours:
    corners = np.array([0, 2, 4]) * np.pi / 3 + rng.uniform(-0.25, 0.25, 3)
    return [np.stack([np.cos(corners), np.sin(corners)], axis=1)]


def _star(rng: Generator) -> Contours:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]]


def _cross(rng: Generator) -> Contours:
    w = rng.uniform(0.22, 0.36)
    quarter = np.array([(w, w), (w, 1), (-w, 1)])
    turns = [np.array([(c, -s), (s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [np.concatenate([quarter @ turn.T for turn in turns])]


def _crescent(rng: Generator) -> Contours:
    """The unit disc minus a disc of the same size, shifted to the right."""
    offset = rng.uniform(0.55, 0.85)
    cut = float(np.arccos(offset / 2))
    inner = _arc(np.pi + cut, np.pi - cut) + (offset, 0)
    return [np.concatenate([_arc(cut, 2 * np.pi - cut), inner])]


def _blob(rng: Generator) -> tuple[Contours, float]:
    """A smooth shape without corners."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    waves = np.arange(2, 5)
    phases = np.outer(angles, waves) + rng.uniform(0, 2 * np.pi, 3)
    radii = 0.6 + (np.cos(phases) * rng.uniform(0.05, 0.22, 3)).sum(axis=1)
    lump = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    return [lump * (1.0, rng.uniform(0.45, 0.9))], float(rng.uniform(0.06, 0.3))


def _splinter(rng: Generator) -> tuple[Contours, float]:
    """An irregular polygon with five to eight corners."""
    corners = int(rng.integers(5, 9))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radii = rng.uniform(0.3, 1.0, corners)
    polygon = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    return [polygon], float(rng.uniform(0.06, 0.35))


def _line(rng: Generator) -> tuple[Contours, float]:
    """A long thin bar."""
    length, thickness = float(rng.uniform(0.3, 1.2)), rng.uniform(0.003, 0.012)
    return [_rectangle(1.0, thickness / length)], length


def _specks(rng: Generator) -> tuple[Contours, float]:
    """Scattered specks."""
    places = rng.uniform(-1, 1, (int(rng.integers(3, 9)), 2))
    specks = [_arc(0, 2 * np.pi, rng.uniform(0.02, 0.08), 10) + place for place in places]
    return specks, float(rng.uniform(0.1, 0.4))


_FIGURES: dict[str, Callable[[Generator], Contours]] = {
    'disc': _disc,
    'ring': _ring,
    'box': _box,
    'triangle': _triangle,
    'star': _star,
    'cross': _cross,
    'crescent': _crescent,
    'stripes': _box,
}
_CLUTTER: tuple[Callable[[Generator], tuple[Contours, float]], ...] = (
    _blob,
    _splinter,
    _line,
    _specks,
)
