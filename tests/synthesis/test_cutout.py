# SPDX-License-Identifier: Apache-2.0
"""Cutout erases rectangles as configured, and nothing else."""

import pytest
import torch

from mmzsq.errors import UserError
from mmzsq.synthesis.cutout import Cutout


def test_erases_one_rectangle_of_the_configured_area_and_ratio() -> None:
    torch.manual_seed(0)
    erased = Cutout(probability=1.0, area=(0.1, 0.2), ratio=(0.5, 2.0), value=0.0)(torch.ones(200, 3, 64, 64)) == 0
    assert (erased == erased[:, :1]).all()
    for mask in erased[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = len(rows), len(columns)
        assert int(mask.sum()) == height * width == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.09 < height * width / 64**2 < 0.22
        assert 0.45 < height / width < 2.2


def test_erases_the_configured_share_of_images() -> None:
    torch.manual_seed(0)
    erased = (Cutout(probability=0.5)(torch.ones(1000, 1, 16, 16)) == 0).flatten(1).any(1)
    assert 0.4 < erased.float().mean() < 0.6
    assert not (Cutout(probability=0.0)(torch.ones(50, 1, 16, 16)) == 0).any()


def test_erased_pixels_get_no_gradient_and_the_others_theirs() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    seen = Cutout(probability=1.0, value=0.5)(images)
    seen.sum().backward()
    assert torch.equal(images.grad, (seen == images).float())


def test_images_and_gradients_stay_channels_last() -> None:
    """Another layout would spread to all features of the network and be several times slower on a GPU."""
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = Cutout(probability=1.0)(images)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(seen.square().sum(), images)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_draws_differ_between_calls_and_repeat_for_a_seed() -> None:
    images = torch.ones(8, 3, 32, 32)
    cutout = Cutout(probability=1.0)
    torch.manual_seed(3)
    first, second = cutout(images), cutout(images)
    torch.manual_seed(3)
    assert torch.equal(cutout(images), first)
    assert not torch.equal(first, second)


def test_rectangles_of_the_mean_color_leave_the_mean_of_an_image_as_it_was() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 3, 32, 32) * torch.rand(6, 3, 1, 1)
    seen = Cutout(probability=1.0, value='mean')(images.requires_grad_())
    for image, erased in zip(images, seen, strict=True):
        inside = (erased != image).any(0)
        assert 0.01 < inside.float().mean() < 0.25
        torch.testing.assert_close(erased[:, inside], image.mean((1, 2))[:, None].expand(3, int(inside.sum())))
    # The content of a rectangle does not affect the pixels around it.
    (grad,) = torch.autograd.grad(seen.sum(), images)
    assert torch.equal(grad, (seen == images).float())


@pytest.mark.parametrize(
    'kwargs',
    [dict(probability=1.5), dict(area=(0.5, 0.2)), dict(ratio=(0, 1)), dict(value=2.0), dict(value='black')],
)
def test_refuses_impossible_ranges(kwargs: dict) -> None:
    with pytest.raises(UserError):
        Cutout(**kwargs)
