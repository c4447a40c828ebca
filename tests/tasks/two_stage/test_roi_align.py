# SPDX-License-Identifier: Apache-2.0
"""RoIAlign over all levels at once equals torchvision's, level by level."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import roi_align as reference

from mmzsq.tasks.two_stage.roi_align import PyramidLayout, flatten_pyramid, roi_align

SCALES = [1 / 4, 1 / 8, 1 / 16]
DEVICE = torch.device('cpu')


@pytest.mark.parametrize(
    ('output_size', 'samples', 'aligned'), [((7, 7), 2, True), ((14, 14), 1, True), ((3, 5), 2, False)]
)
def test_it_equals_torchvisions_forward_and_backward_on_every_level(
    output_size: tuple[int, int], samples: int, aligned: bool
) -> None:
    maps = [torch.randn(2, 3, side, side + 3, dtype=torch.float64, requires_grad=True) for side in (20, 10, 5)]
    low = torch.rand(60, 2, dtype=torch.float64) * 100 - 15
    # Some boxes lie outside the image, some are smaller than a cell.
    bboxes = torch.cat((low, low + torch.rand(60, 2, dtype=torch.float64) ** 2 * 70), dim=1)
    image, level = torch.randint(2, (60,)), torch.randint(3, (60,))
    levels = PyramidLayout.build([(m.shape[2], m.shape[3]) for m in maps], SCALES, 2, DEVICE)

    pooled = roi_align(flatten_pyramid(maps), levels, image, level, bboxes, output_size, samples, aligned)

    expected = torch.zeros_like(pooled)
    for index, (level_map, scale) in enumerate(zip(maps, SCALES, strict=True)):
        of_level = level == index
        rois = torch.cat((image[of_level, None].double(), bboxes[of_level]), dim=1)
        expected[of_level] = reference(level_map, rois, output_size, scale, samples, aligned)
    assert_close(pooled, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(pooled)
    for gradient, wanted in zip(
        torch.autograd.grad((pooled * weights).sum(), maps),
        torch.autograd.grad((expected * weights).sum(), maps),
        strict=True,
    ):
        assert wanted.abs().sum() > 0
        assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_huge_boxes_read_nothing_outside_the_maps() -> None:
    maps = [torch.ones(1, 2, 4, 4)]
    levels = PyramidLayout.build([(4, 4)], [0.25], 1, DEVICE)
    bboxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [1e9, 1e9, 1e9, 1e9]])
    zero = torch.zeros(2, dtype=torch.long)
    assert roi_align(flatten_pyramid(maps), levels, zero, zero, bboxes, (2, 2), 2).abs().max() <= 1
