# SPDX-License-Identifier: Apache-2.0
"""Sizes of the stages of ``zsq.synthesis`` whose ``image_size`` is None."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

SIZE_MULTIPLE = 32
"""Sizes that a config does not give in pixels are multiples of this many pixels."""

DEFAULT_SIZE = 640
"""Side in pixels of finished images where neither the config nor a test pipeline gives one."""

COARSE_SHARE = 0.25
"""Size of the coarse stage as a share of the full size."""

SMALLEST_COARSE = 160
"""Smallest shorter side of a coarse stage in pixels: objects need some room to take shape."""


def stages_of(synthesis: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and section of each stage in order; the sections are those of the argument, not copies."""
    for name in ('relabel', 'refine', 'synthesize'):
        stages = synthesis.get(name)
        for stage in stages if isinstance(stages, (list, tuple)) else [stages]:
            if stage is not None:
                yield name, stage


def coarse_sizes(full: tuple[int, int], multiple: int = SIZE_MULTIPLE) -> Iterator[tuple[int, int]]:
    """Yield the candidates for the size of the coarse stage, from a quarter of the full size up to the full size.

    Args:
        full: Height and width of the finished images in pixels.
        multiple: Sides, except those of the full size, are multiples of this many pixels.

    Example:
        >>> list(coarse_sizes((320, 320)))
        [(160, 160), (192, 192), (224, 224), (256, 256), (288, 288), (320, 320)]
    """
    short = min(full)
    side = math.ceil(max(COARSE_SHARE * short, SMALLEST_COARSE) / multiple) * multiple
    while side < short:
        yield _scaled(full, side / short, multiple)
        side += multiple
    yield full


def complete_sizes(
    synthesis: Mapping[str, Any], full: tuple[int, int] | None = None, coarse: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Fill in each ``image_size`` that is None; sizes that are set stay.

    Args:
        synthesis: The section ``zsq.synthesis``; not changed.
        full: Height and width for ``synthesize``; None: :data:`DEFAULT_SIZE`.
        coarse: Height and width for ``relabel``; None: the first of :func:`coarse_sizes`. Stages of ``refine`` lie
            between the coarse and the full size in equal ratios.

    Returns:
        A completed copy.
    """
    completed = copy.deepcopy(dict(synthesis))
    last = completed['synthesize']
    if last.get('image_size', 0) is None:
        last['image_size'] = list(full or (DEFAULT_SIZE, DEFAULT_SIZE))
    given = last.get('image_size')
    sides = [given, given] if isinstance(given, int) else given
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        # Parsing the stage reports it.
        return completed
    height, width = sides
    first = coarse or next(coarse_sizes((height, width)))
    refine = [stage for name, stage in stages_of(completed) if name == 'refine']
    for name, stage in stages_of(completed):
        if stage.get('image_size', 0) is not None:
            continue
        if name == 'relabel' or tuple(first) == (height, width):
            stage['image_size'] = list(first)
            continue
        place = next(index for index, other in enumerate(refine) if other is stage)
        ratio = (height / first[0]) ** ((place + 1) / (len(refine) + 1))
        stage['image_size'] = list(_scaled((height, width), first[0] * ratio / height, SIZE_MULTIPLE))
    return completed


def _scaled(size: tuple[int, int], factor: float, multiple: int) -> tuple[int, int]:
    height, width = (max(round(side * factor / multiple), 1) * multiple for side in size)
    return height, width
