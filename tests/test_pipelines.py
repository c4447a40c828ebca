# SPDX-License-Identifier: Apache-2.0
"""Sizes of images that test pipelines make, compared with the pipelines themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mmdet.utils import register_all_modules

from mmzsq.image_detector import pipelines_of
from mmzsq.pipelines import Frame, frame_of, pipeline_of

LOAD = dict(type='LoadImageFromFile')
PACK = dict(type='PackDetInputs', meta_keys=('img_shape',))


@pytest.mark.parametrize(
    ('transforms', 'frame'),
    [
        ([dict(type='mmzsq.LetterResize', scale=(64, 48))], Frame(48, 64, True)),
        ([dict(type='Resize', scale=(96, 64), keep_ratio=False)], Frame(64, 96, True)),
        ([dict(type='mmdet.Resize', scale=(96, 64), keep_ratio=True)], Frame(64, 96, False)),
        ([dict(type='FixScaleResize', scale=(64, 96), keep_ratio=True)], Frame(96, 64, False)),
        (
            [dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='Pad', size=(96, 64))],
            Frame(64, 96, True),
        ),
        (
            [dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='Pad', pad_to_square=True)],
            Frame(96, 96, True),
        ),
    ],
)
@pytest.mark.parametrize('shape', [(50, 80), (80, 50)])
def test_the_frame_holds_the_images_of_the_pipeline(
    transforms: list[dict[str, Any]], frame: Frame, shape: tuple[int, int]
) -> None:
    register_all_modules()
    assert frame_of([LOAD, *transforms, PACK]) == frame
    _, pipeline = pipelines_of(dict(test_dataloader=dict(dataset=dict(pipeline=[LOAD, *transforms, PACK]))))
    made: Any = pipeline(dict(img=np.zeros((*shape, 3), np.uint8), img_id=0))
    height, width = made['inputs'].shape[1:]
    if frame.fixed and 'pad_to_square' not in str(transforms):
        assert (height, width) == (frame.height, frame.width)
    else:
        assert max(height, width) <= max(frame[:2]) and min(height, width) <= max(frame[:2])


def test_sides_are_padded_to_multiples() -> None:
    assert frame_of([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], 32) == Frame(800, 1344, False)


def test_a_pipeline_without_a_size_has_no_frame() -> None:
    assert frame_of([LOAD, dict(type='Pad', size_divisor=32), dict(type='Resize', scale_factor=2.0), PACK]) is None


def test_the_pipeline_is_that_of_the_test_or_else_of_the_validation_data() -> None:
    pipeline = [dict(type='Resize', scale=(64, 64))]
    data = dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=pipeline)))
    assert pipeline_of(dict(test_dataloader=data)) == pipeline
    assert pipeline_of(dict(test_dataloader=None, val_dataloader=data)) == pipeline
    assert pipeline_of({}) == []
