# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.models.yolov5.assignment import find_candidates


def one_target(x: float, y: float, width: float, height: float) -> PaddedTargets:
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return PaddedTargets(
        torch.tensor([[box]]),
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, 1, dtype=torch.bool),
    )


def matches(targets: PaddedTargets, anchors: Tensor) -> list[tuple[int, int, int]]:
    """Return (anchor, column, row) of all matches on a map of 4 rows and 6 columns."""
    # A second scale checks that scales are not mixed up.
    both = torch.stack((anchors, 100 * anchors))
    found = find_candidates(targets, both, torch.tensor([8, 16]), torch.tensor([4, 2]), torch.tensor([6, 3]), 4.0)
    x, y, matched = (of_scale[0] for of_scale in found)
    return sorted(
        (anchor, int(x[0, 0, 0, place]), int(y[0, 0, 0, place])) for anchor, place in matched[0, 0].nonzero().tolist()
    )


SQUARE = torch.tensor([[10.0, 10.0]])


@pytest.mark.parametrize(
    ('center', 'cells'),
    [
        ((2.2, 1.3), [(2, 1), (1, 1), (2, 0)]),  # upper left of its cell: left and up
        ((2.8, 1.7), [(2, 1), (3, 1), (2, 2)]),  # lower right: right and down
        ((0.2, 0.3), [(0, 0)]),  # nothing lies outside the map
        ((5.8, 3.9), [(5, 3)]),
        ((2.5, 1.5), [(2, 1)]),  # in the middle, no side is nearer
        # On a border, both neighbors are near, and the right one is the cell itself. The original implementation
        # also counts it twice.
        ((2.0, 1.5), [(2, 1), (1, 1), (2, 1)]),
        ((6.0, 4.0), [(5, 3), (5, 3), (5, 3)]),  # on the border of the map: the cell inside
    ],
)
def test_center_and_nearest_neighbors_are_matched(center: tuple[float, float], cells: list[tuple[int, int]]) -> None:
    found = matches(one_target(center[0] * 8, center[1] * 8, 10, 10), SQUARE)
    assert found == sorted((0, *cell) for cell in cells)


def test_only_anchors_of_similar_size_are_matched() -> None:
    anchors = torch.tensor([[10.0, 10.0], [39.9, 10.0], [40.0, 10.0], [10.0, 2.6], [10.0, 2.5]])
    found = matches(one_target(20, 12, 10, 10), anchors)
    assert {anchor for anchor, _, _ in found} == {0, 1, 3}


def test_padding_and_empty_boxes_are_not_matched() -> None:
    targets = one_target(20, 12, 10, 10)
    assert not matches(targets._replace(valid=torch.zeros(1, 1, dtype=torch.bool)), SQUARE)
    assert not matches(one_target(20, 12, 0, 0), SQUARE)


def test_targets_are_padded_to_the_longest_image() -> None:
    first = InstanceData(bboxes=torch.rand(2, 4), labels=torch.tensor([5, 6]))
    second = InstanceData(bboxes=HorizontalBoxes(torch.rand(1, 4)), labels=torch.tensor([7]))
    none = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    targets = pad_targets([first, second, none])
    assert targets.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert targets.labels[targets.valid].tolist() == [5, 6, 7]
    torch.testing.assert_close(targets.bboxes[0], first.bboxes)
    torch.testing.assert_close(targets.bboxes[1, 0], second.bboxes.tensor[0])
    assert pad_targets([none, none]).bboxes.shape == (2, 0, 4)


def test_targets_are_padded_to_a_given_length_or_rejected() -> None:
    image = InstanceData(bboxes=torch.rand(2, 4), labels=torch.tensor([5, 6]))
    targets = pad_targets([image], length=5)
    assert targets.bboxes.shape == (1, 5, 4)
    assert targets.valid.sum() == 2
    with pytest.raises(ValueError, match='2 targets'):
        pad_targets([image], length=1)
