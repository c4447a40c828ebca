# SPDX-License-Identifier: Apache-2.0
"""Periodic textures of procedural pictures: 1/f noise and regular patterns.

The amplitude spectrum of natural images falls as 1/f (Field, "Relations between the statistics of natural images and
the response properties of cortical cells", 1987). Noise with such a spectrum therefore has the contrast of natural
surfaces at all scales.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

TILE = 256
"""Side of a texture in pixels. Textures are periodic, so that they cover areas of any size."""


def texture_atlas(rng: Generator, count: int) -> np.ndarray:
    """Draw textures: 1/f noise of several roughnesses, and patterns.

    Args:
        rng: Source of randomness.
        count: Number of textures; at least half are noise.

    Returns:
        Textures (count, TILE, TILE), float32, of mean 0 and standard deviation 1.
    """
    noise = [spectral_noise(rng, rng.uniform(0.7, 1.8)) for _ in range(count - count // 2)]
    patterns = [_pattern(rng, noise[index % len(noise)]) for index in range(count // 2)]
    return np.stack([*noise, *patterns])


def spectral_noise(rng: Generator, exponent: float, size: int = TILE) -> np.ndarray:
    """Draw periodic noise whose amplitude falls as ``1 / f ** exponent``.

    Args:
        rng: Source of randomness.
        exponent: 0: white; 1: the mean of natural images; 2: smooth clouds.
        size: Side in pixels.

    Returns:
        Noise (size, size), float32, of mean 0 and standard deviation 1.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    # The mean is set below.
    frequency[0, 0] = 1.0
    phase = rng.random(frequency.shape) * (2 * np.pi)
    return _standardize(np.fft.irfft2(np.exp(1j * phase) * frequency**-exponent, (size, size)))


def _pattern(rng: Generator, noise: np.ndarray) -> np.ndarray:
    """Draw stripes, waves, checks, dots or bricks, distorted and mixed with noise."""
    bend = rng.choice([0.0, 0.0, 2.0, 8.0]) * noise
    y, x = np.mgrid[:TILE, :TILE].astype(np.float32)
    # Whole periods in a tile. Most surfaces repeat every 5 to 40 pixels.
    periods = rng.integers(6, 48, 2)
    u, v = ((axis + bend) * (count / TILE) for axis, count in zip((x, y), periods, strict=True))
    kind = rng.integers(5)
    if kind == 0:
        pattern = (u % 1 < rng.uniform(0.2, 0.8)).astype(np.float32)
    elif kind == 1:
        pattern = np.sin(2 * np.pi * u)
    elif kind == 2:
        pattern = ((u % 1 < 0.5) ^ (v % 1 < 0.5)).astype(np.float32)
    elif kind == 3:
        pattern = (np.hypot(u % 1 - 0.5, v % 1 - 0.5) < rng.uniform(0.15, 0.45)).astype(np.float32)
    else:
        joint = rng.uniform(0.05, 0.2)
        shifted = u + 0.5 * (np.floor(v) % 2)
        pattern = ((shifted % 1 > joint) & (v % 1 > joint)).astype(np.float32)
    return _standardize(_standardize(pattern) + rng.uniform(0.1, 0.8) * noise)


def _standardize(values: np.ndarray) -> np.ndarray:
    values = values - values.mean()
    return (values / max(float(values.std()), 1e-6)).astype(np.float32)
