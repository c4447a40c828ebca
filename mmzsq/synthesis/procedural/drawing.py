# SPDX-License-Identifier: Apache-2.0
"""Draw many procedural pictures on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import SeedSequence
from torch.utils.data import DataLoader, Dataset

from mmzsq.synthesis.procedural.pictures import procedural_image

PICTURES_VERSION = 1
"""Incremented when equal seeds give other pictures than before."""

FEW_PICTURES = 8
"""Number of pictures that this process draws faster than it can start others."""


def picture_seed(seed: int, index: int) -> SeedSequence:
    """Derive the seed of a picture, the same on every machine.

    Args:
        seed: Seed of the set.
        index: Index of the picture in the set.
    """
    return SeedSequence([seed, index])


def draw_pictures(
    seeds: Sequence[SeedSequence], height: int, width: int, processes: int | None = None
) -> Iterator[np.ndarray]:
    """Draw pictures in other processes, ahead of the caller.

    Args:
        seeds: One for each picture, see :func:`~mmzsq.synthesis.procedural.procedural_image`.
        height: In pixels.
        width: In pixels.
        processes: Number of processes. None: one for each core of this machine, or this process alone for a few
            pictures. The pictures do not depend on it.

    Yields:
        Pictures (height, width, 3), uint8, RGB, in the order of ``seeds``.
    """
    if processes is None:
        processes = _cores() if len(seeds) > FEW_PICTURES else 1
    if processes <= 1:
        for seed in seeds:
            yield procedural_image(height, width, seed)
        return
    loader = DataLoader(
        _Pictures(seeds, height, width),
        batch_size=None,
        num_workers=min(processes, len(seeds)),
        collate_fn=_unchanged,
        worker_init_fn=_use_one_thread,
        # It would otherwise draw from the global generator, and change the random numbers of the caller.
        generator=torch.Generator().manual_seed(0),
    )
    # A forked process would wait forever for OpenCV's threads, which it does not inherit. This ends them.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        pictures = iter(loader)
    finally:
        cv2.setNumThreads(threads)
    yield from pictures


class _Pictures(Dataset[np.ndarray]):
    def __init__(self, seeds: Sequence[SeedSequence], height: int, width: int) -> None:
        self.seeds = seeds
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> np.ndarray:
        return procedural_image(*self.size, self.seeds[index])


def _cores() -> int:
    """Return the number of cores for each process of a distributed run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(cores // int(os.environ.get('LOCAL_WORLD_SIZE', '1')), 1)


def _unchanged(picture: Any) -> Any:
    return picture


def _use_one_thread(worker: int) -> None:
    cv2.setNumThreads(1)
