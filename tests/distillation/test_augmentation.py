# SPDX-License-Identifier: Apache-2.0
"""Augmentation of batches: effect of each kind on the pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from mmzsq.distillation import BatchAugmentation
from mmzsq.distillation.augmentation import mosaics
from mmzsq.errors import UserError

BLACK, WHITE = torch.tensor([-2.0, -1.0, 0.0]).view(3, 1, 1), torch.tensor([2.0, 3.0, 1.0]).view(3, 1, 1)


@pytest.fixture
def images() -> Tensor:
    return BLACK + torch.rand(6, 3, 10, 14) * (WHITE - BLACK)


def test_flips_are_horizontal_with_the_given_probability(images: Tensor) -> None:
    assert torch.equal(BatchAugmentation(flip=1)(images, BLACK, WHITE), vision.horizontal_flip(images))
    many = images[:1].expand(2000, -1, -1, -1)
    flipped = (BatchAugmentation(flip=0.25)(many, BLACK, WHITE) != many).flatten(1).any(1)
    assert flipped.float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_a_mosaic_holds_an_image_and_the_next_three_at_half_their_size(images: Tensor) -> None:
    tiled = mosaics(images)
    small = vision.resize(images, [5, 7], antialias=True)
    for index in range(len(images)):
        quarters = [tiled[index, :, y : y + 5, x : x + 7] for y in (0, 5) for x in (0, 7)]
        for offset, quarter in enumerate(quarters):
            torch.testing.assert_close(quarter, small[(index + offset) % len(images)])
    assert mosaics(images[:, :, :9, :13]).shape == (6, 3, 9, 13)


def test_a_tint_scales_each_channel_of_each_image_from_black_and_stays_in_range(images: Tensor) -> None:
    tinted = BatchAugmentation(color=0.3)(images, BLACK, WHITE)
    assert (tinted <= WHITE).all() and (tinted >= BLACK).all()
    inside = tinted < WHITE
    ratio = (tinted - BLACK) / (images - BLACK)
    for index in range(6):
        for channel in range(3):
            gains = ratio[index, channel][inside[index, channel]]
            torch.testing.assert_close(gains, gains.mean().expand_as(gains), rtol=1e-3, atol=1e-3)
            assert 0.74 <= gains.mean().item() <= 1.35
    assert ratio.amin((2, 3)).unique().numel() > 10


def test_without_settings_images_are_unchanged(images: Tensor) -> None:
    assert torch.equal(BatchAugmentation()(images, BLACK, WHITE), images)
    assert BatchAugmentation.from_cfg(None) is None


@pytest.mark.parametrize(
    ('cfg', 'message'), [(dict(flip=2), 'flip is 2, but must be a number from 0 to 1'), (dict(mosaik=1), 'mosaic')]
)
def test_a_wrong_setting_is_refused(cfg: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchAugmentation.from_cfg(cfg)
