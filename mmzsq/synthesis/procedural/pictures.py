# SPDX-License-Identifier: Apache-2.0
"""Procedural pictures: random scenes that share the low-level statistics of photographs.

The model is that of dead leaves: opaque shapes of power-law sizes that cover each other (Lee, Mumford and Huang,
"Occlusion models for natural images", 2001). Such pictures have the edges, scales and spectrum of natural scenes, and
networks trained on them see almost as well as on simple renderings (Baradad et al., "Learning to see by looking at
noise", 2021). Here, shapes also have texture, shading, parts and contact shadows. There are strokes, rows of equal
shapes and characters, and the picture has a blurred background, one direction of light and the errors of a camera.

A layer is drawn as a map of indices of shapes, later shapes over earlier ones. Colors are then computed for all pixels
at once.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence

from mmzsq.synthesis.procedural.outlines import fill, outline, place, stroke
from mmzsq.synthesis.procedural.textures import TILE, spectral_noise, texture_atlas

REFERENCE_SIDE = 640
"""Lengths below are in pixels of a picture with this side, and scale with the picture."""

TEXTURES = 6
MAX_SHAPES = 2500
"""Number of shapes of a layer beyond which none is added."""


def procedural_image(height: int, width: int, seed_sequence: SeedSequence) -> np.ndarray:
    """Draw a picture.

    Equal arguments give equal pictures, in any process. Versions of NumPy and OpenCV that round differently may change
    single pixels by one level.

    Args:
        height: In pixels.
        width: In pixels.
        seed_sequence: Seed of the picture.

    Returns:
        The picture (height, width, 3), uint8, RGB.
    """
    rng = np.random.default_rng(seed_sequence)
    atlas = texture_atlas(rng, TEXTURES)
    palette = _Palette(rng)
    picture = _background(rng, height, width, atlas, palette)
    layer = _Layer(rng, height, width, palette)
    layer.scatter()
    drawn = layer.render(atlas)
    if layer.covers:
        picture = drawn
    else:
        cover = (layer.index_map > 0).astype(np.float32)[..., None]
        picture += cover * (drawn - picture)
    return _photograph(rng, picture)


class _Palette:
    """Colors of one scene: a few hues, with more gray than vivid ones.

    Args:
        rng: Source of randomness.
    """

    def __init__(self, rng: Generator) -> None:
        count = rng.integers(3, 8)
        # Natural colors vary mostly between blue and orange, and least between green and magenta.
        self.hues = rng.normal(0, 1, (count, 1)) * (0.7, 0.1, -0.7) + rng.normal(0, 0.45, (count, 1)) * (
            -0.4,
            0.8,
            -0.4,
        )
        # Some scenes are colorless, as in fog or at night.
        self.vividness = rng.choice([3.0, 18.0, 30.0, 50.0], p=[0.08, 0.37, 0.35, 0.2])

    def colors(self, rng: Generator, count: int) -> np.ndarray:
        """Draw colors (count, 3) in [0, 255] and somewhat beyond."""
        hue = self.hues[rng.integers(len(self.hues), size=count)] + rng.normal(0, 0.2, (count, 3))
        chroma = np.abs(rng.normal(0, self.vividness, (count, 1)))
        return rng.normal(115, 60, (count, 1)) + 1.5 * chroma * hue


class _Layer:
    """Shapes at one distance from the camera.

    Args:
        rng: Source of randomness.
        height: In pixels.
        width: In pixels.
        palette: Colors of the scene.

    Attributes:
        index_map: (height, width), int32: the shape at each pixel, from 1; 0: none.
        covers: Whether shape 0 is drawn too, so that the layer covers the picture.
    """

    def __init__(self, rng: Generator, height: int, width: int, palette: _Palette) -> None:
        self.rng = rng
        self.palette = palette
        self.size = np.array([width, height])
        self.scale = float(np.sqrt(height * width)) / REFERENCE_SIDE
        self.index_map = np.zeros((height, width), np.int32)
        self.covers = False
        self.centers = [(width / 2, height / 2)]
        self.radii = [self.scale * REFERENCE_SIDE / 2]

    def scatter(self) -> None:
        """Draw shapes of power-law sizes at random positions."""
        rng = self.rng
        smallest, largest = rng.uniform(4, 14), rng.uniform(130, 340)
        exponent = rng.uniform(0.6, 1.6)
        radii = _power_law(rng, int(np.exp(rng.uniform(np.log(60), np.log(1000)))), smallest, largest, exponent)
        if rng.random() < 0.6:
            # Small things in front, as in scenes.
            radii = np.sort(radii)[::-1]
        # Things stand upright in some scenes, and lie in all directions in others.
        tilt = rng.choice([0.03, 0.3, np.pi])
        for radius in radii * self.scale:
            center = rng.uniform(-0.05, 1.05, 2) * self.size
            angle = rng.normal(0, tilt)
            kind = rng.random()
            if kind < 0.7:
                self._object(center, radius, angle)
            elif kind < 0.84:
                self._stroke(center, radius)
            elif kind < 0.94:
                self._row(center, radius, angle)
            else:
                self._text(center, radius, angle)
            if len(self.radii) > MAX_SHAPES:
                break

    def _next(self, center: np.ndarray, radius: float) -> int:
        self.centers.append((float(center[0]), float(center[1])))
        self.radii.append(max(float(radius), 1.0))
        return len(self.radii) - 1

    def _object(self, center: np.ndarray, radius: float, angle: float) -> None:
        """Draw a shape, often with parts on it."""
        rng = self.rng
        fill(self.index_map, place(outline(rng), center, radius, angle), self._next(center, radius))
        if radius < 10 * self.scale or rng.random() < 0.5:
            return
        for _ in range(rng.integers(1, 8)):
            part = radius * rng.uniform(0.08, 0.4)
            at = center + rng.normal(0, 0.4 * radius, 2)
            fill(self.index_map, place(outline(rng), at, part, angle), self._next(at, part))

    def _stroke(self, center: np.ndarray, radius: float) -> None:
        """Draw a curve: wires, poles, limbs, twigs."""
        rng = self.rng
        steps = np.cumsum(rng.normal(rng.normal(0, 1, 2), rng.choice([0.0, 0.3, 1.0]), (12, 2)), 0)
        points = center + (steps - steps[0]) * (radius / 4)
        thickness = max(round(self.scale * min(abs(rng.normal(0, 6)), radius / 2)), 1)
        stroke(self.index_map, points, thickness, self._next(center, radius))

    def _row(self, center: np.ndarray, radius: float, angle: float) -> None:
        """Draw equal shapes on a grid: windows, fences, goods on a shelf."""
        rng = self.rng
        columns, rows = rng.integers(1, 9), rng.integers(1, 6)
        part = max(radius / max(columns, rows), 2.0)
        shape = outline(rng)
        gap = part * rng.uniform(1.6, 3, 2)
        cosine, sine = np.cos(angle), np.sin(angle)
        alike = rng.random() < 0.5
        index = self._next(center, part) if alike else 0
        for column in range(columns):
            for row in range(rows):
                x, y = (column - (columns - 1) / 2) * gap[0], (row - (rows - 1) / 2) * gap[1]
                at = center + np.array([cosine * x - sine * y, sine * x + cosine * y])
                fill(self.index_map, place(shape, at, part, angle), index if alike else self._next(at, part))

    def _text(self, center: np.ndarray, radius: float, angle: float) -> None:
        """Draw a line of invented characters, each a stroke through corners of a grid."""
        rng = self.rng
        index = self._next(center, radius)
        size = self.scale * float(np.clip(radius / self.scale / 8, 5, 40))
        thickness = max(round(size * rng.uniform(0.06, 0.2)), 1)
        for position in range(rng.integers(1, 10)):
            corners = rng.integers(0, 3, (rng.integers(3, 7), 2)) / 2 * (0.6, 1) + (0.9 * position, 0)
            stroke(self.index_map, place(corners, center, size, angle), thickness, index)

    def render(self, atlas: np.ndarray) -> np.ndarray:
        """Color the pixels.

        Args:
            atlas: Textures (n, TILE, TILE).

        Returns:
            (height, width, 3), float32, about [0, 255].
        """
        rng, count = self.rng, len(self.radii)
        centers, radii = np.array(self.centers), np.array(self.radii)[:, None]
        at = self.index_map
        height, width = at.shape
        y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)

        def pick(values: np.ndarray) -> np.ndarray:
            return values.astype(np.float32)[at]

        # Shading: brightness increases along a direction across the shape.
        slope = rng.normal(0, 22, (count, 2)) / radii
        shade = pick(slope[:, 0]) * x + pick(slope[:, 1]) * y - pick((slope * centers).sum(1))
        np.clip(shade, -60, 60, out=shade)
        # Each shape has its own view of a texture: scaled, rotated and moved.
        angle = rng.uniform(0, 2 * np.pi, count)
        zoom = np.exp(rng.normal(0, 0.5, count)) / max(self.scale, 0.5)
        cosine, sine = pick(zoom * np.cos(angle)), pick(zoom * np.sin(angle))
        u = (cosine * x - sine * y + pick(rng.uniform(0, TILE, count))).astype(np.int32) & (TILE - 1)
        v = (sine * x + cosine * y + pick(rng.uniform(0, TILE, count))).astype(np.int32) & (TILE - 1)
        # Patterns are rarer than noise.
        slots = np.minimum(rng.integers(len(atlas), size=count), rng.integers(len(atlas), size=count))
        texture = atlas.ravel()[(slots.astype(np.int32)[at] * TILE + v) * TILE + u]
        texture *= pick(np.abs(rng.normal(0, 28, count)))
        # It modulates the brightness, and some color.
        tint = (1 + rng.normal(0, 0.15, (count, 3))).astype(np.float32)
        colors = self.palette.colors(rng, count).astype(np.float32)
        picture = tint[at]
        picture *= texture[..., None]
        picture += colors[at]
        picture += shade[..., None]
        self._cast_shadows(picture)
        return picture

    def _cast_shadows(self, picture: np.ndarray) -> None:
        """Darken pixels beside higher shapes, in place: soft shadows where things touch."""
        rng = self.rng
        strength = rng.choice([0.0, 0.25, 0.5])
        if not strength:
            return
        top = rng.random(len(self.radii)).astype(np.float32)[self.index_map]
        reach = self.scale * rng.uniform(2, 8)
        around = cv2.GaussianBlur(top, (0, 0), reach)
        shift = np.array([[1, 0, rng.normal(0, reach)], [0, 1, rng.normal(0, reach)]], np.float32)
        around = cv2.warpAffine(around, shift, picture.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        picture *= (1 - strength * np.clip(around - top, 0, 1))[..., None]


def _power_law(rng: Generator, count: int, low: float, high: float, exponent: float) -> np.ndarray:
    """Draw sizes with density ``size ** -(exponent + 1)`` between two bounds, by inversion of the distribution."""
    first, last = low**-exponent, high**-exponent
    return (first - rng.random(count) * (first - last)) ** (-1 / exponent)


def _background(rng: Generator, height: int, width: int, atlas: np.ndarray, palette: _Palette) -> np.ndarray:
    """Draw what is behind: sky and ground, or large shapes out of focus. Returns (height, width, 3), float32."""
    # Out of focus, a third of the resolution is enough.
    small = (max(height // 3, 8), max(width // 3, 8))
    layer = _Layer(rng, *small, palette)
    if rng.random() < 0.5:
        horizon = rng.uniform(0.2, 0.8) * small[0]
        ground = np.array([[0, horizon], [small[1], horizon + rng.normal(0, 4)], [small[1], small[0]], [0, small[0]]])
        fill(layer.index_map, ground, layer._next(ground.mean(0), small[0]))
    for radius in _power_law(rng, int(rng.integers(0, 30)), 25, 250, 0.8) * layer.scale:
        layer._object(rng.uniform(0, 1, 2) * layer.size, radius, rng.uniform(0, np.pi))
    drawn = layer.render(atlas)
    clouds = cv2.resize(spectral_noise(rng, 1.8, 64), small[::-1], interpolation=cv2.INTER_CUBIC)
    drawn += (rng.uniform(0, 35) * clouds)[..., None]
    blur = layer.scale * abs(rng.normal(0, 6))
    if blur > 0.3:
        drawn = cv2.GaussianBlur(drawn, (0, 0), blur)
    return cv2.resize(drawn, (width, height), interpolation=cv2.INTER_LINEAR)


def _photograph(rng: Generator, picture: np.ndarray) -> np.ndarray:
    """Light the scene and take a photograph: uneven light, tint, exposure, blur and noise; uint8."""
    height, width = picture.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    across, down = rng.normal(0, 0.18, 2).astype(np.float32)
    corner = np.float32(abs(rng.normal(0, 0.12)))
    light = np.clip(1 + across * x + down * y - corner * (x * x + y * y), 0.2, 2)
    picture *= light[..., None]
    # Pixels of cameras and of compressed files are never sharper than this.
    sigma = 0.4 + abs(rng.normal(0, 0.35))
    picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    # Exposure: the mean and the contrast of photographs vary.
    mean, deviation = cv2.meanStdDev(picture.mean(2))
    contrast = np.clip(rng.normal(62, 14), 20, 95) / max(float(deviation[0, 0]), 12.0)
    contrast = min(contrast, 2.0)
    tint = (1 + rng.normal(0, 0.06, 3)).astype(np.float32)
    picture -= np.float32(mean[0, 0])
    picture *= np.float32(contrast) * tint
    picture += np.float32(np.clip(rng.normal(112, 34), 30, 210)) * tint
    grain = rng.choice([0.0, 1.5, 4.0], p=[0.4, 0.45, 0.15])
    if grain:
        picture += (grain * rng.standard_normal((height, width), np.float32))[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
