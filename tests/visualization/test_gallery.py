# SPDX-License-Identifier: Apache-2.0
"""Contact sheets show what a set holds: boxes and, where there are any, masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmzsq.synthesis import CalibrationSet
from mmzsq.synthesis.label_samplers import ellipse_masks
from mmzsq.visualization import save_gallery, save_set_gallery
from mmzsq.visualization.gallery import MASK_OPACITY, draw_labels

SIZE = (128, 128)
TILE = 256
INNER = torch.tensor([[24.0, 40.0, 88.0, 104.0]])
"""What the mask fills an ellipse of: less than the box, whose lines would hide the outline."""


def label(masks: bool = True) -> InstanceData:
    bboxes = torch.tensor([[16.0, 32.0, 96.0, 112.0]])
    instances = InstanceData(bboxes=bboxes, labels=torch.tensor([0]))
    if masks:
        instances.masks = ellipse_masks(INNER, SIZE)
    return instances


def test_a_mask_tints_its_object_outlines_it_and_leaves_all_else_as_it_is() -> None:
    grey = np.full((*SIZE, 3), 100, np.uint8)
    plain, drawn = (draw_labels(grey, label(masks), ['']) for masks in (False, True))
    inside = ellipse_masks(2 * INNER, (TILE, TILE))[0].numpy()
    red = np.array([255, 35, 35])
    # The middle of the ellipse is tinted, its top end outlined, two pixels of the tile for one of the image.
    np.testing.assert_allclose(drawn[144, 112], 100 * (1 - MASK_OPACITY) + MASK_OPACITY * red, atol=1)
    top = next(row for row in range(66, 144) if not np.array_equal(drawn[row, 112], plain[row, 112]))
    assert top in (80, 81)
    np.testing.assert_allclose(drawn[top, 112], red, atol=1)
    changed = (drawn != plain).any(2)
    near = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert not (changed & ~near).any()
    assert changed.sum() > 0.95 * inside.sum()


def test_masks_of_an_image_that_is_not_square_lie_where_the_image_lies() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, 128.0, 64.0]]),
        labels=torch.tensor([0]),
        masks=torch.ones(1, 64, 128, dtype=torch.bool),
    )
    drawn = draw_labels(wide, instances, [''])
    assert drawn[:128].any(2).all()
    assert (drawn[128:] == 255).all()


@pytest.mark.parametrize('masks', [True, False])
def test_the_gallery_of_a_set_shows_the_labels_on_disk(tmp_path: Path, masks: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    calibration_set = CalibrationSet.open(tmp_path / 'set', fingerprint={}, num_images=2, shard_size=2, classes=['cat'])
    calibration_set.write_shard(0, images, [label(masks)] * 2)
    calibration_set.merge()
    save_set_gallery(tmp_path / 'set.png', tmp_path / 'set', [1, 0])
    save_gallery(tmp_path / 'direct.png', images[::-1], [label(masks)] * 2, ['cat'])
    assert (tmp_path / 'set.png').read_bytes() == (tmp_path / 'direct.png').read_bytes()
    save_gallery(tmp_path / 'plain.png', images[::-1], [label(False)] * 2, ['cat'])
    assert ((tmp_path / 'set.png').read_bytes() != (tmp_path / 'plain.png').read_bytes()) == masks
