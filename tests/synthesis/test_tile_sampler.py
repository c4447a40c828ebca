# SPDX-License-Identifier: Apache-2.0
"""The Tile baseline: every box alone in a cell of the smallest square grid that has enough of them."""

from __future__ import annotations

import math

import pytest
import torch
from mmengine.structures import InstanceData
from torchvision.ops import box_iou

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import TileSampler

SIZE = (120, 240)
WIDTH_HEIGHT = torch.tensor([240.0, 120.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(count: int, images: int = 200, **arguments: object) -> list[InstanceData]:
    """Labels of images with ``count`` boxes."""
    return TileSampler(num_boxes=(count, count), **arguments).sample(images, SIZE, 5, generator())


def in_grid(instances: InstanceData, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Column and row of each box's cell (n, 2), and its corners within the cell, as shares of that, (n, 2) each."""
    corners = instances.bboxes.view(-1, 2, 2) / WIDTH_HEIGHT * rows
    cell = corners.mean(dim=1).floor()
    return cell, corners[:, 0] - cell, corners[:, 1] - cell


@pytest.mark.parametrize(('count', 'rows'), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (16, 4), (17, 5)])
def test_each_box_lies_in_a_cell_of_its_own(count: int, rows: int) -> None:
    assert rows == math.ceil(math.sqrt(count))
    for instances in sample(count, images=20):
        assert len(instances) == count
        cell, low, high = in_grid(instances, rows)
        assert len(set(map(tuple, cell.tolist()))) == count
        assert ((cell >= 0) & (cell < rows)).all()
        assert (low >= -1e-5).all()
        assert (high <= 1 + 1e-5).all()


def test_images_of_one_call_have_grids_of_their_own() -> None:
    sampler = TileSampler(count_histogram=[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], side=(1.0, 1.0))
    for instances in sampler.sample(20, SIZE, 5, generator()):
        # Boxes that fill their cells cover the image, be they one or sixteen.
        sides = instances.bboxes[:, 2:] - instances.bboxes[:, :2]
        torch.testing.assert_close(sides, (WIDTH_HEIGHT / len(instances) ** 0.5).expand_as(sides))
        assert sides.prod(dim=1).sum() == pytest.approx(120 * 240)


def test_every_cell_is_taken_equally_often() -> None:
    taken = torch.zeros(3, 3)
    for instances in sample(5, images=900):
        column, row = in_grid(instances, 3)[0].long().T
        taken[row, column] += 1
    # 900 draws of 5 of 9 cells.
    assert (taken - 500).abs().max() < 5 * (900 * 5 / 9 * 4 / 9) ** 0.5


def test_sides_are_shares_of_the_cell_and_places_are_random() -> None:
    corners = [in_grid(one, 2)[1:] for one in sample(4, side=(0.2, 0.5))]
    low, high = (torch.cat(parts) for parts in zip(*corners, strict=True))
    side = high - low
    assert side.min() == pytest.approx(0.2, abs=0.01)
    assert side.max() == pytest.approx(0.5, abs=0.01)
    assert side.mean() == pytest.approx(0.35, abs=0.02)
    # As likely to the left as to the right.
    assert (low / (1 - side)).mean() == pytest.approx(0.5, abs=0.05)


def test_neighbors_never_overlap() -> None:
    for instances in sample(9, images=50, side=(0.9, 1.0)):
        assert box_iou(instances.bboxes, instances.bboxes).fill_diagonal_(0).max() < 1e-4


def test_the_number_of_boxes_is_uniform_or_follows_a_histogram() -> None:
    def counts(sampler: TileSampler) -> list[float]:
        drawn = torch.tensor([len(instances) for instances in sampler.sample(3000, SIZE, 5, generator())])
        return (drawn.bincount(minlength=10) / 3000).tolist()

    assert counts(TileSampler()) == pytest.approx([0] + [1 / 9] * 9, abs=0.03)
    assert counts(TileSampler(count_histogram=[0, 3, 0, 0, 1])) == pytest.approx(
        [0, 0, 0.75, 0, 0, 0.25, *[0] * 4], abs=0.03
    )


def test_classes_are_uniform_and_the_generator_alone_decides() -> None:
    first = sample(9, images=500)
    classes = torch.cat([instances.labels for instances in first])
    assert (classes.bincount(minlength=5) / len(classes)).tolist() == pytest.approx([0.2] * 5, abs=0.03)
    torch.manual_seed(99)
    for one, other in zip(first, sample(9, images=500), strict=True):
        assert torch.equal(one.bboxes, other.bboxes)
        assert torch.equal(one.labels, other.labels)
    assert first[0].bboxes.dtype == torch.float32
    assert first[0].labels.dtype == torch.long


def test_labels_are_fixed_and_no_real_one_is_read() -> None:
    sampler = LABEL_SAMPLERS.build(dict(type='mmzsq.TileSampler'))
    assert not sampler.adaptive
    assert not sampler.uses_real_labels


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_boxes=(0, 3)), 'TileSampler: num_boxes must be two numbers'),
        (dict(side=(0.5, 1.2)), 'TileSampler: side must be two numbers'),
        (dict(count_histogram=[]), 'TileSampler: count_histogram must be a list of weights'),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TileSampler(**arguments)
