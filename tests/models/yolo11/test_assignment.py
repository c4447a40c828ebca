# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from mmzsq.boxes import complete_iou
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolo11.assignment import Assignment, assign_targets

# Six locations in a row, 8 pixels apart.
POINTS = torch.tensor([[4.0 + 8 * index, 4.0] for index in range(6)])


def targets(*bboxes: tuple[float, float, float, float], labels: list[int] | None = None) -> PaddedTargets:
    """Assign the targets of one image."""
    count = len(bboxes)
    return PaddedTargets(
        torch.tensor([bboxes]),
        torch.tensor([labels or [0] * count]),
        torch.ones(1, count, dtype=torch.bool),
    )


def assign(wanted: PaddedTargets, bboxes: Tensor, scores: Tensor, topk: int = 10, beta: float = 6.0) -> Assignment:
    return assign_targets(bboxes[None], scores[None], POINTS, wanted, topk, 0.5, beta)


def test_only_locations_strictly_inside_are_assigned() -> None:
    wanted = targets((4.0, 0.0, 29.0, 8.0))
    bboxes = wanted.bboxes[0].expand(6, 4)
    # The first location lies on the edge.
    found = assign(wanted, bboxes, torch.full((6, 2), 0.5))
    assert (found.score[0] > 0).tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(found.score[0, 1:4], torch.ones(3))


def test_the_topk_locations_by_alignment_are_assigned() -> None:
    wanted = targets((0.0, 0.0, 48.0, 8.0))
    widths = torch.tensor([10.0, 40, 20, 48, 30, 25])
    bboxes = torch.stack((torch.zeros(6), torch.zeros(6), widths, torch.full((6,), 8.0)), 1)
    scores = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.9, 0.9])[:, None]
    found = assign(wanted, bboxes, scores, topk=3)
    iou = complete_iou(bboxes, wanted.bboxes[0])
    alignment = scores[:, 0].sqrt() * iou**6
    best = alignment.topk(3).indices
    assert sorted(found.score[0].nonzero().flatten().tolist()) == sorted(best.tolist()) == [1, 3, 4]
    # The target score of the best-aligned location is the best IoU among the three.
    torch.testing.assert_close(found.score[0, best], alignment[best] / alignment[best[0]] * iou[best].max())


def test_alignment_uses_the_score_of_the_targets_class() -> None:
    wanted = targets((0.0, 0.0, 48.0, 8.0), labels=[1])
    bboxes = wanted.bboxes[0].expand(6, 4)
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    assert assign(wanted, bboxes, scores, topk=1).score[0].nonzero().flatten().tolist() == [1]


def test_a_contested_location_gets_the_target_it_overlaps_most() -> None:
    wanted = targets((0.0, 0.0, 24.0, 8.0), (8.0, 0.0, 48.0, 8.0))
    bboxes = torch.tensor([[0.0, 0.0, 24.0, 8.0]]).repeat(6, 1)
    bboxes[2:] = torch.tensor([8.0, 0.0, 46.0, 8.0])
    found = assign(wanted, bboxes, torch.full((6, 1), 0.5))
    # Locations 1 and 2 lie inside both targets.
    assert found.target[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert (found.score > 0).all()


def test_padding_and_boxes_of_zero_area_are_not_assigned() -> None:
    wanted = targets((0.0, 0.0, 48.0, 8.0), (20.0, 4.0, 20.0, 4.0))
    bboxes = wanted.bboxes[0, 0].expand(6, 4)
    nobody = assign(wanted._replace(valid=torch.tensor([[False, True]])), bboxes, torch.full((6, 1), 0.5))
    assert not nobody.score.any()
    assert not nobody.target.any()


@pytest.mark.parametrize('prediction', [(60.0, 0.0, 90.0, 8.0), (4.0, 4.0, 4.0, 4.0)])
def test_boxes_without_overlap_are_not_assigned(prediction: tuple[float, ...]) -> None:
    found = assign(targets((0.0, 0.0, 48.0, 8.0)), torch.tensor([prediction] * 6), torch.full((6, 1), 0.5))
    assert not found.score.any()


def test_ties_in_alignment_are_all_assigned() -> None:
    wanted = targets((0.0, 0.0, 48.0, 8.0))
    found = assign(wanted, wanted.bboxes[0].expand(6, 4), torch.full((6, 1), 0.5), topk=2)
    torch.testing.assert_close(found.score, torch.ones(1, 6))


def test_no_gradient_flows_through_the_assignment() -> None:
    wanted = targets((0.0, 0.0, 48.0, 8.0))
    bboxes = wanted.bboxes[0].expand(6, 4).clone().requires_grad_()
    assert not assign(wanted, bboxes, torch.full((6, 1), 0.5, requires_grad=True)).score.requires_grad
