# SPDX-License-Identifier: Apache-2.0
"""Contact sheets show the boxes and masks of a set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.masks import ellipse_masks
from mmzsq.synthesis import CalibrationSet
from mmzsq.visualization import save_gallery, save_set_gallery, save_side_by_side
from mmzsq.visualization.gallery import GAP, MASK_OPACITY, TITLE_HEIGHT, draw_labels

SIZE = (128, 128)
TILE = 256
INNER = torch.tensor([[24.0, 40.0, 88.0, 104.0]])
"""Box of the mask's ellipse; smaller than the label's box, whose lines would hide the outline."""


def label(masks: bool = True) -> InstanceData:
    bboxes = torch.tensor([[16.0, 32.0, 96.0, 112.0]])
    instances = InstanceData(bboxes=bboxes, labels=torch.tensor([0]))
    if masks:
        instances.masks = ellipse_masks(INNER, SIZE)
    return instances


def test_a_mask_tints_its_object_outlines_it_and_leaves_all_else_as_it_is() -> None:
    gray = np.full((*SIZE, 3), 100, np.uint8)
    plain, drawn = (draw_labels(gray, label(masks), ['']) for masks in (False, True))
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
    assert drawn.shape == (128, 256, 3)
    assert drawn.any(2).all()


def test_images_that_are_not_square_leave_no_white_between_them(tmp_path: Path) -> None:
    wide = [np.full((64, 128, 3), 100, np.uint8)] * 4
    save_gallery(tmp_path / 'wide.png', wide, [label(False)] * 4, ['cat'])
    sheet = cv2.imread(str(tmp_path / 'wide.png'))
    # Three in the first row, one in the second.
    assert sheet.shape == (2 * 128 + GAP, 3 * 256 + 2 * GAP, 3)


def write_set(root: Path, images: np.ndarray, masks: bool) -> Path:
    count = len(images)
    made = CalibrationSet.open(root, fingerprint={}, num_images=count, shard_size=count, classes=['cat'])
    made.write_shard(0, images, [label(masks)] * count)
    made.merge()
    return root


@pytest.mark.parametrize('masks', [True, False])
def test_the_gallery_of_a_set_shows_the_labels_on_disk(tmp_path: Path, masks: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    write_set(tmp_path / 'set', images, masks)
    save_set_gallery(tmp_path / 'set.png', tmp_path / 'set', [1, 0])
    save_gallery(tmp_path / 'direct.png', images[::-1], [label(masks)] * 2, ['cat'])
    assert (tmp_path / 'set.png').read_bytes() == (tmp_path / 'direct.png').read_bytes()
    save_gallery(tmp_path / 'plain.png', images[::-1], [label(False)] * 2, ['cat'])
    assert ((tmp_path / 'set.png').read_bytes() != (tmp_path / 'plain.png').read_bytes()) == masks


def test_side_by_side_shows_the_same_indices_of_each_set(repo: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    many = random.integers(0, 256, (2, 3, *SIZE, 3), dtype=np.uint8)
    roots = [write_set(tmp_path / name, images, masks=False) for name, images in zip('ab', many, strict=True)]
    tool = [sys.executable, repo / 'tools/analysis_tools/compare_galleries.py']
    words = [f'first={roots[0]}', roots[1], '--out', tmp_path / 'both.png', '--indices', '2', '0']
    subprocess.run([*tool, *words], check=True, timeout=60)
    sheet = cv2.imread(str(tmp_path / 'both.png'))[..., ::-1]
    height = TITLE_HEIGHT + TILE
    assert sheet.shape == (2 * height, 2 * TILE + GAP, 3)
    for row, images in enumerate(many):
        for column, index in enumerate((2, 0)):
            left = column * (TILE + GAP)
            shown = sheet[row * height + TITLE_HEIGHT :][:TILE, left : left + TILE]
            np.testing.assert_array_equal(shown, draw_labels(images[index], label(False), ['cat']))
        assert (sheet[row * height : row * height + TITLE_HEIGHT] < 128).any(), 'no name over the row'


def test_missing_images_sets_and_folders_are_errors(tmp_path: Path) -> None:
    root = write_set(tmp_path / 'set', np.zeros((2, *SIZE, 3), np.uint8), masks=False)
    with pytest.raises(UserError, match='has images 0 to 1, but 2 was requested'):
        save_side_by_side(tmp_path / 'out.png', {'set': root}, [2])
    with pytest.raises(UserError, match='not the folder of a complete calibration set'):
        save_side_by_side(tmp_path / 'out.png', {'set': tmp_path}, [0])
    annotations = root / 'annotations' / 'instances.json'
    annotations.write_text('{')
    with pytest.raises(UserError, match='instances.json is damaged'):
        save_side_by_side(tmp_path / 'out.png', {'set': root}, [0])
    write_set(tmp_path / 'other', np.zeros((2, *SIZE, 3), np.uint8), masks=False)
    root = tmp_path / 'other'
    with pytest.raises(UserError, match='cannot write'):
        save_side_by_side(tmp_path / 'missing' / 'out.png', {'set': root}, [0])
