# SPDX-License-Identifier: Apache-2.0
"""Dynamic-k matching of a batch equals MMDetection's assigners, image by image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.task_modules.assigners import DynamicSoftLabelAssigner, SimOTAAssigner
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.models.padded_targets import pad_targets
from mmzsq.tasks.one_stage.matching import Match, match_dynamic_k, match_sim_ota, match_soft_label

SIZE = (96, 128)
KINDS: dict[str, tuple[type, Callable[..., Match]]] = {
    'sim_ota': (SimOTAAssigner, match_sim_ota),
    'soft_label': (DynamicSoftLabelAssigner, match_soft_label),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[type, Callable[..., Match]]:
    return KINDS[request.param]


def grid() -> Tensor:
    """Return centers and strides of all locations for images of SIZE, (P, 4)."""
    levels = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(torch.arange(SIZE[0] // stride), torch.arange(SIZE[1] // stride), indexing='ij')
        middles = (torch.stack((x.flatten(), y.flatten()), 1) + 0.5) * stride
        levels.append(torch.cat((middles, torch.full_like(middles, stride)), 1))
    return torch.cat(levels)


def draw_predictions(priors: Tensor, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw boxes around the locations, (N, P, 4), and scores in [0, 1], (N, P, 3)."""
    generator = torch.Generator().manual_seed(seed)
    sides = 4 * torch.rand(images, len(priors), 2, generator=generator).mul(2).exp() * priors[:, 2:] / 8
    return torch.cat((priors[:, :2] - sides, priors[:, :2] + sides), -1), torch.rand(
        images, len(priors), 3, generator=generator
    )


def assign_one_by_one(
    assigner: Any, bboxes: Tensor, scores: Tensor, priors: Tensor, labels: list[InstanceData]
) -> list[Any]:
    return [
        assigner.assign(InstanceData(bboxes=boxes, scores=score, priors=priors), entry)
        for boxes, score, entry in zip(bboxes, scores, labels, strict=True)
    ]


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('sides', [(8, 70), (1, 12)])
def test_matches_are_mmdetections(
    kind: tuple[type, Callable[..., Match]],
    labels: Callable[..., list[InstanceData]],
    seed: int,
    sides: tuple[float, float],
) -> None:
    wanted, priors = labels((1, 0, 30, 7), sides, seed), grid()
    bboxes, scores = draw_predictions(priors, 4, seed)
    assigner = kind[0]()
    found = kind[1](assigner, bboxes, scores, priors, pad_targets(wanted, 32))
    for image, expected in enumerate(assign_one_by_one(assigner, bboxes, scores, priors, wanted)):
        positive = expected.gt_inds > 0
        assert torch.equal(found.positive[image], positive)
        assert torch.equal(found.target[image][positive], expected.gt_inds[positive] - 1)
        torch.testing.assert_close(found.overlap[image][positive], expected.max_overlaps[positive])
        assert not found.overlap[image][~positive].any()


def test_padding_changes_no_match(
    kind: tuple[type, Callable[..., Match]], labels: Callable[..., list[InstanceData]]
) -> None:
    wanted, priors = labels((5, 2)), grid()
    bboxes, scores = draw_predictions(priors, 2, 0)
    targets = pad_targets(wanted, 16)
    # The padding contains the whole image as a box, which would match every location.
    full = torch.tensor([0.0, 0.0, SIZE[1], SIZE[0]])
    filled = targets._replace(bboxes=torch.where(targets.valid[..., None], targets.bboxes, full))
    short, long = (kind[1](kind[0](), bboxes, scores, priors, each) for each in (pad_targets(wanted), filled))
    for value, expected in zip(long, short, strict=True):
        assert torch.equal(value, expected)


def test_ties_in_cost_match_no_more_than_k_locations() -> None:
    cost = torch.ones(1, 1, 12)
    overlap = torch.full((1, 1, 12), 0.5)
    found = match_dynamic_k(cost, overlap, torch.ones(1, 12, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), 10)
    assert found.positive.sum() == 5


def test_a_label_without_overlap_and_with_infinite_costs_gets_one_location() -> None:
    cost = torch.tensor([[[torch.inf, torch.inf, 0.0]]])
    candidate = torch.tensor([[True, True, False]])
    found = match_dynamic_k(cost, torch.zeros(1, 1, 3), candidate, torch.ones(1, 1, dtype=torch.bool), 3)
    assert found.positive.sum() == 1
    assert not found.positive[0, 2]


def test_a_contested_location_goes_to_the_label_of_lowest_cost() -> None:
    """Worked by hand: labels 0 and 1 both select only location 0. Label 2 does not, but its cost is the lowest."""
    cost = torch.tensor([[[2.0, 5.0], [3.0, 6.0], [1.0, 0.5]]])
    overlap = torch.tensor([[[0.9, 0.0], [0.8, 0.0], [0.3, 0.7]]])
    found = match_dynamic_k(cost, overlap, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool), 2)
    assert found.target.tolist() == [[2, 2]]
    torch.testing.assert_close(found.overlap, torch.tensor([[0.3, 0.7]]))
