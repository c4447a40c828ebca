# SPDX-License-Identifier: Apache-2.0
"""Read from the config of a test pipeline how it resizes images, without building it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Frame(NamedTuple):
    """Size of the images that a pipeline makes.

    Attributes:
        height: In pixels.
        width: In pixels.
        fixed: Whether every image has this size. If not, images keep their aspect ratio: they have at most these sides
            and may stand upright.
    """

    height: int
    width: int
    fixed: bool


def pipeline_of(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the transforms of ``test_dataloader``, or else of ``val_dataloader``; empty if there are none.

    Args:
        cfg: A config of MMDetection.
    """
    for loader in ('test_dataloader', 'val_dataloader'):
        dataset: Any = (cfg.get(loader) or {}).get('dataset') or {}
        while 'pipeline' not in dataset and dataset.get('dataset'):
            dataset = dataset['dataset']
        if dataset.get('pipeline'):
            return list(dataset['pipeline'])
    return []


def frame_of(pipeline: Sequence[Mapping[str, Any]], divisor: int = 1) -> Frame | None:
    """Find the size of the images that a pipeline makes.

    Args:
        pipeline: Configs of transforms.
        divisor: ``pad_size_divisor`` of the data preprocessor, to multiples of which sides are padded.

    Returns:
        The size, or None if no transform determines it.
    """
    frame: Frame | None = None
    for transform in pipeline:
        name = transform_name(transform)
        if name == 'Pad' and transform.get('pad_to_square') and frame is not None:
            frame = Frame(max(frame[:2]), max(frame[:2]), True)
            continue
        scale = transform.get('size' if name == 'Pad' else 'scale')
        if name not in ('LetterResize', 'Resize', 'FixScaleResize', 'Pad') or scale is None:
            continue
        scale = (scale, scale) if isinstance(scale, (int, float)) else tuple(scale)
        if len(scale) != 2 or not all(isinstance(side, int) and side > 0 for side in scale):
            continue
        keeps_ratio = name in ('Resize', 'FixScaleResize') and transform.get('keep_ratio')
        frame = Frame(scale[1], scale[0], not keeps_ratio)
    if frame is None:
        return None
    height, width = (math.ceil(side / divisor) * divisor for side in frame[:2])
    return Frame(height, width, frame.fixed)


def resize_of(pipeline: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Describe how a test pipeline resizes images.

    Args:
        pipeline: Configs of transforms.

    Returns:
        ``mode``: ``'letterbox'`` (keep the aspect ratio, pad evenly on both sides), ``'keep_ratio'`` (pad at bottom
        and right) or ``'stretch'``; ``scale`` (width, height) in pixels; ``pad_value`` in [0, 255], None if no
        transform pads: normalized images are then padded at bottom and right. None if no transform resizes.
    """
    found: dict[str, Any] | None = None
    for transform in pipeline:
        name = transform_name(transform)
        if name == 'LetterResize':
            found = dict(mode='letterbox', scale=list(transform['scale']), pad_value=transform.get('pad_val', 114))
        elif name in ('Resize', 'FixScaleResize'):
            mode = 'keep_ratio' if transform.get('keep_ratio') else 'stretch'
            scale = transform.get('scale')
            found = dict(mode=mode, scale=None if scale is None else list(scale), pad_value=None)
        elif name == 'Pad' and found is not None:
            value = transform.get('pad_val', 0)
            found['pad_value'] = value.get('img', 0) if isinstance(value, Mapping) else value
    return found


def transform_name(transform: Mapping[str, Any]) -> str:
    """Return the class name of a transform, without a scope."""
    kind = transform.get('type')
    return str(kind if isinstance(kind, str) else getattr(kind, '__name__', kind)).rpartition('.')[2]
