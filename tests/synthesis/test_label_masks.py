# SPDX-License-Identifier: Apache-2.0
"""Masks of labels: ellipses, resizing and bounding boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from mmzsq.masks import ellipse_masks, mask_boxes, resize_masks
from mmzsq.synthesis import MultiBoxSampler
from mmzsq.synthesis.label_samplers import fit_masks

SIZE = (40, 60)


def iou(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (masks & others).flatten(1).sum(1) / (masks | others).flatten(1).sum(1)


def boxes(count: int, size: tuple[int, int], side: tuple[float, float] = (0.1, 0.9), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return MultiBoxSampler((count, count), side).sample(1, size, 1, generator)[0].bboxes


def inside(bbox: list[float], x: float, y: float) -> bool:
    """Return whether a point lies in the ellipse inscribed in a box, by the sum of its distances to the foci."""
    x1, y1, x2, y2 = bbox
    a, b = (x2 - x1) / 2, (y2 - y1) / 2
    focus = math.sqrt(abs(a * a - b * b))
    along_x, along_y = (focus, 0.0) if a > b else (0.0, focus)
    dx, dy = x - (x1 + x2) / 2, y - (y1 + y2) / 2
    total = math.hypot(dx - along_x, dy - along_y) + math.hypot(dx + along_x, dy + along_y)
    return total <= 2 * max(a, b)


def test_an_ellipse_holds_the_pixels_whose_centers_lie_in_it() -> None:
    bboxes = boxes(6, SIZE)
    for bbox, mask in zip(bboxes.tolist(), ellipse_masks(bboxes, SIZE), strict=True):
        expected = [[inside(bbox, x + 0.5, y + 0.5) for x in range(SIZE[1])] for y in range(SIZE[0])]
        assert mask.tolist() == expected


def test_an_ellipse_touches_all_four_sides_of_its_box_and_fills_pi_quarters_of_it() -> None:
    bboxes = torch.tensor([[10.0, 20.0, 210.0, 320.0], [300.0, 0.0, 400.0, 30.0]])
    masks = ellipse_masks(bboxes, (400, 400))
    torch.testing.assert_close(mask_boxes(masks), bboxes)
    area = (bboxes[:, 2:] - bboxes[:, :2]).prod(1)
    torch.testing.assert_close(masks.flatten(1).sum(1) / area, torch.full((2,), math.pi / 4), rtol=1e-2, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 0.2))
def test_no_ellipse_is_empty_however_small_its_box(seed: int, side: float) -> None:
    bboxes = boxes(8, SIZE, (side / 10, side), seed)
    masks = ellipse_masks(bboxes, SIZE)
    assert masks.flatten(1).any(1).all()
    # And the one pixel of a tiny box is that in its middle.
    tiny = masks.flatten(1).sum(1) == 1
    middle = (bboxes[:, :2] + bboxes[:, 2:])[tiny] / 2
    assert ((mask_boxes(masks)[tiny][:, :2] + 0.5 - middle).abs() <= 1).all()


def test_boxes_without_extent_at_the_edges_get_a_pixel_of_the_image() -> None:
    height, width = SIZE
    bboxes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [width, height, width, height]]).float()
    assert ellipse_masks(bboxes, SIZE).nonzero().tolist() == [[0, 0, 0], [1, height - 1, width - 1]]


def test_no_boxes_have_no_masks() -> None:
    assert ellipse_masks(torch.zeros(0, 4), SIZE).shape == (0, *SIZE)
    assert resize_masks(torch.zeros(0, 5, 5, dtype=torch.bool), SIZE).shape == (0, *SIZE)
    assert mask_boxes(torch.zeros(0, *SIZE, dtype=torch.bool)).shape == (0, 4)


def test_an_enlarged_ellipse_equals_one_drawn_at_that_size() -> None:
    bboxes = boxes(10, (160, 160), (0.2, 0.8))
    small, large = ellipse_masks(bboxes, (160, 160)), ellipse_masks(4 * bboxes, (640, 640))
    resized = resize_masks(small, (640, 640))
    blocky = F.interpolate(small[None].float(), (640, 640), mode='nearest')[0] > 0
    assert (iou(resized, large) > 0.98).all()
    assert (iou(resized, large) > iou(blocky, large)).all()


def test_a_reduced_mask_keeps_its_area() -> None:
    large = ellipse_masks(boxes(10, (640, 640), (0.2, 0.8)), (640, 640))
    share = large.float().mean((1, 2))
    torch.testing.assert_close(resize_masks(large, (80, 100)).float().mean((1, 2)), share, rtol=0.03, atol=0)


def test_a_mask_smaller_than_a_pixel_becomes_one_pixel() -> None:
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, 63, 63] = masks[1, 20, 41] = True
    # The third is empty, and stays so.
    assert resize_masks(masks, (8, 8)).nonzero().tolist() == [[0, 7, 7], [1, 2, 5]]


def test_masks_are_bounded_as_torchvision_does() -> None:
    masks = torch.rand(20, 12, 9, generator=torch.Generator().manual_seed(0)) > 0.97
    masks = masks[masks.flatten(1).any(1)]
    # Its boxes end at the last pixel, ours at the far edge of it.
    torch.testing.assert_close(mask_boxes(masks), masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert mask_boxes(torch.zeros(1, 5, 5, dtype=torch.bool)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize('needed', [True, False])
@pytest.mark.parametrize('given_masks', [True, False])
def test_labels_have_masks_if_and_only_if_they_are_needed(needed: bool, given_masks: bool) -> None:
    label = InstanceData(bboxes=boxes(3, SIZE), labels=torch.zeros(3, dtype=torch.long))
    if given_masks:
        label.masks = torch.ones(3, *SIZE, dtype=torch.bool)
    [fitted] = fit_masks([label], SIZE, needed)
    assert ('masks' in fitted) == needed
    assert ('masks' in label) == given_masks
    assert torch.equal(fitted.bboxes, label.bboxes)
    if needed:
        assert torch.equal(fitted.masks, label.masks if given_masks else ellipse_masks(label.bboxes, SIZE))
