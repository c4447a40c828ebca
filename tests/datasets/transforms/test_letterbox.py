# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks

from mmzsq.datasets.transforms import LetterResize
from mmzsq.errors import UserError


def loaded(height: int, width: int, box: tuple[int, int, int, int]) -> dict:
    """Loaded results of a black image with one white box, its mask and its map."""
    x1, y1, x2, y2 = box
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return dict(
        img=image,
        img_shape=(height, width),
        gt_bboxes=HorizontalBoxes(torch.tensor([box], dtype=torch.float32)),
        gt_masks=BitmapMasks((image[None, ..., 0] > 0).astype(np.uint8), height, width),
        gt_seg_map=(image[..., 0] > 0).astype(np.uint8),
    )


@pytest.mark.parametrize(
    ('size', 'frame', 'padding'),
    [
        ((40, 80), (160, 160), (40, 40, 0, 0)),  # enlarged, padded above and below
        ((80, 40), (160, 160), (0, 0, 40, 40)),
        ((80, 40), (160, 96), (0, 0, 56, 56)),  # a portrait in a landscape frame
        ((300, 400), (100, 100), (12, 13, 0, 0)),  # shrunk; the odd pixel goes to the bottom
        ((64, 64), (64, 64), (0, 0, 0, 0)),
    ],
)
def test_image_boxes_and_masks_move_together(
    size: tuple[int, int], frame: tuple[int, int], padding: tuple[int, int, int, int]
) -> None:
    height, width = size
    box = (width // 4, height // 4, width // 2, 3 * height // 4)
    results = LetterResize(scale=frame).transform(loaded(height, width, box))
    assert results['img'].shape == (frame[1], frame[0], 3)
    assert results['img_shape'] == (frame[1], frame[0])
    assert results['pad_param'] == padding
    x1, y1, x2, y2 = results['gt_bboxes'].tensor[0].tolist()
    for found in (
        results['img'][..., 0] > 180,
        results['gt_masks'].masks[0] == 1,
        results['gt_seg_map'] == 1,
    ):
        rows, columns = np.nonzero(found)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(edges, (x1, y1, x2, y2), atol=1)


def test_every_channel_of_the_padding_is_grey() -> None:
    results = LetterResize(scale=(80, 80)).transform(loaded(40, 80, (0, 0, 80, 40)))
    for border in (results['img'][:20], results['img'][60:]):
        assert np.all(border == 114)
    assert np.all(results['gt_seg_map'][:20] == 255)
    assert np.all(results['gt_masks'].masks[0, :20] == 0)
    assert np.all(results['img'][20:60] == 255)


def test_meta_data_map_points_back() -> None:
    box = (10, 20, 90, 110)
    results = LetterResize(scale=(160, 128)).transform(loaded(131, 97, box))
    top, _, left, _ = results['pad_param']
    shift = np.array([left, top, left, top])
    back = (results['gt_bboxes'].tensor[0].numpy() - shift) / np.tile(results['scale_factor'], 2)
    np.testing.assert_allclose(back, box, atol=1e-3)
    corner = results['homography_matrix'] @ np.array([10, 20, 1])
    np.testing.assert_allclose(corner[:2], results['gt_bboxes'].tensor[0, :2].numpy(), atol=1e-3)


def test_polygons_move_with_the_boxes() -> None:
    results = loaded(40, 80, (8, 4, 40, 20))
    polygon = np.array([8.0, 4, 40, 4, 40, 20, 8, 20])
    results['gt_masks'] = PolygonMasks([[polygon]], 40, 80)
    results = LetterResize(scale=(160, 160)).transform(results)
    points = results['gt_masks'].masks[0][0].reshape(-1, 2)
    edges = [*points.min(0), *points.max(0)]
    np.testing.assert_allclose(edges, results['gt_bboxes'].tensor[0].numpy())
    assert (results['gt_masks'].height, results['gt_masks'].width) == (160, 160)


def test_annotations_are_optional() -> None:
    results = LetterResize(scale=(64, 64)).transform(dict(img=np.zeros((32, 16, 3), np.uint8)))
    assert results['img'].shape == (64, 64, 3)


@pytest.mark.parametrize('scale', [640, (640,), (0, 640)])
def test_an_invalid_scale_is_an_error(scale: object) -> None:
    with pytest.raises(UserError, match=r'LetterResize.scale'):
        LetterResize(scale=scale)
