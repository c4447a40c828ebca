# SPDX-License-Identifier: Apache-2.0
"""Distillation losses against torch.distributions, hand-worked numbers and what must vanish."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl

from mmzsq.distillation import (
    DensePredictionLoss,
    DensePredictions,
    FeatureMSELoss,
    PredictionKLLoss,
    Recorder,
    match_modules,
)
from mmzsq.errors import UserError


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bbox_head = nn.Conv2d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bbox_head(self.backbone(x))


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_kl_is_that_of_each_map_flattened_into_one_softmax(tau: float) -> None:
    torch.manual_seed(0)
    student = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)]
    teacher = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)]
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for image in range(2):
            kl = reference_kl(
                Categorical(logits=t[image].flatten() / tau), Categorical(logits=s[image].flatten() / tau)
            )
            expected += 0.1 * tau**2 * float(kl) / 2
    loss = PredictionKLLoss(tau=tau, loss_weight=0.1)
    got = loss({'bbox_head': student}, {'bbox_head': teacher}, Detector())
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_kl_over_joined_maps_is_one_vector_an_image() -> None:
    torch.manual_seed(0)
    student, teacher = ([torch.randn(1, 3, 2, 2), torch.randn(1, 3, 1, 1)] for _ in range(2))
    joined_s, joined_t = (torch.cat([m.flatten() for m in maps]) for maps in (student, teacher))
    expected = float(reference_kl(Categorical(logits=joined_t), Categorical(logits=joined_s)))
    loss = PredictionKLLoss(tau=1.0, loss_weight=1.0, join_maps=True)
    assert float(loss({'bbox_head': student}, {'bbox_head': teacher}, Detector())) == pytest.approx(expected, rel=1e-4)


def test_feature_mse_is_the_mean_over_the_selected_layers() -> None:
    detector = Detector()
    student = {'backbone.0': [torch.zeros(1, 4, 2, 2)], 'backbone.1': [torch.zeros(1, 4, 2, 2)], 'bbox_head': []}
    teacher = {
        'backbone.0': [torch.full((1, 4, 2, 2), 2.0)],
        'backbone.1': [torch.full((1, 4, 2, 2), 4.0)],
        'bbox_head': [torch.ones(1)],
    }
    loss = FeatureMSELoss(['backbone.*'], loss_weight=0.5)
    student['backbone.2'] = teacher['backbone.2'] = [torch.zeros(1)]
    assert float(loss(student, teacher, detector)) == pytest.approx(0.5 * (4 + 16 + 0) / 3)


def test_normalised_feature_mse_does_not_depend_on_a_layers_scale() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 3, 3)
    loss = FeatureMSELoss(['backbone.0'], normalise=True)
    small = loss({'backbone.0': [student]}, {'backbone.0': [teacher]}, Detector())
    large = loss({'backbone.0': [100 * student]}, {'backbone.0': [100 * teacher]}, Detector())
    torch.testing.assert_close(small, large)
    assert float(small) == pytest.approx(float(((student - teacher) ** 2).mean() / (teacher**2).mean()))


class Head(nn.Module):
    """Raw maps hold box, objectness and two categories of each location, as they are."""

    def dense_predictions(self, maps: list[torch.Tensor]) -> DensePredictions:
        flat = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        return DensePredictions(flat[..., :4], flat[..., 4], flat[..., 5:])


def dense_maps(objectness: float, class_logits: tuple[float, float], box: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor([*box, objectness, *class_logits]).view(1, 7, 1, 1)


def test_dense_loss_of_one_location_worked_by_hand() -> None:
    detector = SimpleNamespace(bbox_head=Head())
    teacher = dense_maps(1.0, (2.0, -1.0), (0, 0, 10, 10))
    student = dense_maps(-0.5, (0.0, 0.5), (0, 0, 10, 10))
    kl = lambda t, s: float(reference_kl(Bernoulli(logits=torch.tensor(t)), Bernoulli(logits=torch.tensor(s))))  # noqa: E731
    weight = float(torch.tensor(1.0).sigmoid())
    total = max(weight, 1.0)
    expected = kl(1.0, -0.5) / total + weight * (kl(2.0, 0.0) + kl(-1.0, 0.5)) / total
    loss = DensePredictionLoss()
    got = loss({'bbox_head': [student]}, {'bbox_head': [teacher]}, detector)
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_dense_loss_and_its_gradient_are_finite_and_zero_where_student_is_teacher() -> None:
    detector = SimpleNamespace(bbox_head=Head())
    torch.manual_seed(0)
    corners = torch.rand(1, 4, 3, 3) * 10
    corners[:, 2:] += corners[:, :2] + 1
    maps = torch.cat([corners, torch.randn(1, 3, 3, 3)], 1)
    student = maps.clone().requires_grad_()
    loss = DensePredictionLoss()({'bbox_head': [student]}, {'bbox_head': [maps]}, detector)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(student.grad).all() and float(student.grad[:, 4:].abs().max()) < 1e-6


def test_a_head_that_cannot_decode_is_named_with_what_to_use_instead() -> None:
    with pytest.raises(UserError, match='PredictionKLLoss'):
        DensePredictionLoss().taps(Detector())


def test_recorder_hears_every_call_however_made_and_leaves_no_trace() -> None:
    detector = Detector().eval()
    recorder = Recorder(detector, ['backbone.1', 'bbox_head'])
    images = torch.rand(1, 3, 4, 4)
    with recorder.recording() as outputs:
        result = detector(images)
        # As SingleStageDetector._forward calls its head.
        detector.bbox_head.forward(detector.backbone(images))
    assert len(outputs['bbox_head']) == 2 and len(outputs['backbone.1']) == 2
    assert torch.equal(outputs['bbox_head'][0], result) and torch.equal(outputs['bbox_head'][1], result)
    detector(images)
    assert len(outputs['bbox_head']) == 2


def test_modules_are_matched_by_pattern_expression_and_type() -> None:
    detector = Detector()
    assert match_modules(detector, ['backbone.*']) == ['backbone.0', 'backbone.1', 'backbone.2']
    assert match_modules(detector, ['re:.*head']) == ['bbox_head']
    assert match_modules(detector, ['type:_BatchNorm', 'type:Conv2d']) == ['backbone.0', 'backbone.1', 'bbox_head']
    with pytest.raises(UserError, match='neck'):
        match_modules(detector, ['neck.*'])
