# SPDX-License-Identifier: Apache-2.0
"""The loss of dense heads against torch.distributions and values computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli
from torch.distributions import kl_divergence as reference_kl

from mmzsq.distillation import DensePredictionLoss, DensePredictions
from mmzsq.errors import UserError


class Head(nn.Module):
    """Raw maps hold box, objectness and two categories of each location, as they are."""

    def dense_predictions(self, maps: list[torch.Tensor]) -> DensePredictions:
        flat = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        return DensePredictions(flat[..., :4], flat[..., 4], flat[..., 5:])


def dense_maps(objectness: float, class_logits: tuple[float, float], box: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([*box, objectness, *class_logits]).view(1, 7, 1, 1)


SHIFTED = (5, 0, 15, 10)
"""(0, 0, 10, 10) moved to the right by half of its width."""
SHIFTED_CIOU = 50 / 150 - 5**2 / (15**2 + 10**2)
"""Intersection over union, less the squared distance of the centers over that of the enclosing corners."""


def test_dense_loss_of_one_location_worked_by_hand() -> None:
    detector = SimpleNamespace(bbox_head=Head())
    teacher = dense_maps(1.0, (2.0, -1.0), (0, 0, 10, 10))
    student = dense_maps(-0.5, (0.0, 0.5), SHIFTED)
    kl = lambda t, s: float(reference_kl(Bernoulli(logits=torch.tensor(t)), Bernoulli(logits=torch.tensor(s))))  # noqa: E731
    weight = float(torch.tensor(1.0).sigmoid())
    total = max(weight, 1.0)
    expected = kl(1.0, -0.5) / total + weight * (kl(2.0, 0.0) + kl(-1.0, 0.5)) / total
    expected += weight * (1 - SHIFTED_CIOU) / total
    loss = DensePredictionLoss()
    got = loss({'bbox_head': [student]}, {'bbox_head': [teacher]}, detector)
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_boxes_are_weighted_by_the_teachers_objectness() -> None:
    detector = SimpleNamespace(bbox_head=Head())
    teacher = [dense_maps(objectness, (0.0, 0.0), (0, 0, 10, 10)) for objectness in (2.0, -1.0)]
    weights = torch.tensor([2.0, -1.0]).sigmoid().tolist()
    loss = DensePredictionLoss(objectness_weight=0, class_weight=0, box_weight=3.0)
    for moved in range(2):
        boxes = [SHIFTED if location == moved else (0, 0, 10, 10) for location in range(2)]
        student = [dense_maps(0.0, (0.0, 0.0), box) for box in boxes]
        got = loss({'bbox_head': student}, {'bbox_head': teacher}, detector)
        assert float(got) == pytest.approx(3 * weights[moved] * (1 - SHIFTED_CIOU) / sum(weights), rel=1e-5)


def test_dense_loss_and_its_gradient_are_finite_and_zero_where_student_is_teacher() -> None:
    detector = SimpleNamespace(bbox_head=Head())
    torch.manual_seed(0)
    corners = torch.rand(1, 4, 3, 3) * 10
    corners[:, 2:] += corners[:, :2] + 1
    maps = torch.cat([corners, torch.randn(1, 3, 3, 3)], 1)
    student = maps.clone().requires_grad_()
    loss = DensePredictionLoss()({'bbox_head': [student]}, {'bbox_head': [maps]}, detector)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(student.grad).all() and float(student.grad[:, 4:].abs().max()) < 1e-6


def test_error_for_a_head_without_dense_predictions_names_an_alternative() -> None:
    with pytest.raises(UserError, match='PredictionKLLoss'):
        DensePredictionLoss().taps(nn.Conv2d(1, 1, 1))
