# SPDX-License-Identifier: Apache-2.0
"""Balanced terms change the images by their weights, whatever their losses add up to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.synthesis import BNStatisticsPrior, Synthesizer, TotalVariationPrior
from mmzsq.synthesis.gradient_balance import MOMENTUM, GradientBalance, image_gradient_norm
from mmzsq.synthesis.optimization_step import MEASURE_INTERVAL, OptimizationStep
from mmzsq.synthesis.synthesizer import DETECTION_INTERVAL

SIZE = (12, 16)
LABELS = [InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))] * 3


class Task:
    """Pulls images to gray, with a loss that is multiplied by ``scale``; counts what is run."""

    num_classes = 1
    needs_masks = False
    channel_order = 'rgb'
    device = torch.device('cpu')
    loss_precision = SimpleNamespace(fp32_reason=None)

    def __init__(self, scale: float = 1.0, is_batched: bool = True) -> None:
        self.scale = scale
        self.is_batched = is_batched
        torch.manual_seed(0)
        self.detector = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
        self.calls = dict(loss=0, network=0)

    def data_samples(self, labels: Any, image_size: Any) -> list[Any]:
        return list(labels)

    def update_samples(self, samples: Any, labels: Any, image_size: Any) -> bool:
        return False

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        self.calls['loss'] += 1
        self.detector(images)
        return self.scale * (images - 0.5).square().mean()

    def run_network(self, images: Tensor) -> None:
        self.calls['network'] += 1
        self.detector(images)

    def predict(self, images: Tensor) -> list[InstanceData]:
        self.detector(images)
        return list(LABELS)

    def denormalize(self, inputs: Tensor) -> Tensor:
        return inputs


def synthesizer(task: Task, priors: list[Any] | None = None, **options: Any) -> Synthesizer:
    priors = [BNStatisticsPrior(), TotalVariationPrior(weight=0.25)] if priors is None else priors
    return Synthesizer(task, priors, **(dict(balance=True, detection_weight=1.5, lr=0.05) | options))  # type: ignore[arg-type]


def first_gradient(task: Task, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient of the first step, and that of each term at the same images."""
    maker = synthesizer(task, **options)
    torch.manual_seed(1)
    images = torch.rand(3, 3, *SIZE)
    terms = {}
    for prior in maker.priors:
        prior.attach(task.detector)
    leaf = images.clone().requires_grad_()
    terms['detection'] = torch.autograd.grad(task.loss(leaf, None), leaf)[0]
    for prior in maker.priors:
        prior.reset()
        task.run_network(leaf)
        terms[type(prior).__name__] = torch.autograd.grad(prior(leaf), leaf)[0]
    for prior in maker.priors:
        prior.reset()
    step = OptimizationStep(maker, images, list(LABELS))
    step(0.0)
    assert step.images.grad is not None
    return step.images.grad, terms


@pytest.mark.parametrize('interval', [1, 4])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
def test_each_term_has_its_share_of_the_gradient(scale: float, interval: int) -> None:
    gradient, terms = first_gradient(Task(scale), detection_interval=interval)
    reference = terms['BNStatisticsPrior'].flatten(1).norm(dim=1).mean()
    expected = terms['BNStatisticsPrior'].clone()
    for name, weight in (('detection', 1.5), ('TotalVariationPrior', 0.25)):
        expected += weight * reference / terms[name].flatten(1).norm(dim=1).mean() * terms[name]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_without_a_feature_prior_the_detection_loss_is_the_reference() -> None:
    gradient, terms = first_gradient(Task(7.0), priors=[TotalVariationPrior(weight=0.25)])
    reference = terms['detection'].flatten(1).norm(dim=1).mean()
    variation = terms['TotalVariationPrior']
    expected = 1.5 * terms['detection'] + 0.25 * reference / variation.flatten(1).norm(dim=1).mean() * variation
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('interval', [1, 3])
def test_images_do_not_depend_on_the_scale_of_the_loss(interval: int) -> None:
    images = [
        synthesizer(Task(scale), detection_interval=interval).run(LABELS, SIZE, 40, seed=0).images
        for scale in (1.0, 64.0)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)


def test_factors_are_a_geometric_average_in_which_older_measurements_count_less() -> None:
    balance = GradientBalance({'term': 2.0}, torch.device('cpu'))
    gradient = torch.ones(2, 3, 2, 2)
    for scale in (1.0, 4.0):
        balance.measure(gradient, {'term': gradient / scale})
    weights = MOMENTUM, 1.0
    expected = 2.0 * 4.0 ** (weights[1] / sum(weights))
    assert balance.values()['term'] == pytest.approx(expected, rel=1e-5)
    before = balance.values()
    for useless in (torch.zeros_like(gradient), gradient * torch.nan):
        balance.measure(gradient, {'term': useless})
    assert balance.values() == before


def test_the_norm_is_the_mean_over_images() -> None:
    gradient = torch.zeros(2, 3, 4, 4)
    gradient[0, 0, 0, :2] = torch.tensor([3.0, 4.0])
    assert image_gradient_norm(gradient) == 2.5


def test_the_detection_loss_is_renewed_at_its_interval_and_when_labels_change() -> None:
    task = Task(is_batched=False)
    maker = synthesizer(task, detection_interval=4)
    for prior in maker.priors:
        prior.attach(task.detector)
    step = OptimizationStep(maker, torch.rand(3, 3, *SIZE), list(LABELS))
    counts = []
    for index in range(9):
        if index == 6:
            step.set_labels(list(LABELS))
        step(0.01)
        counts.append(task.calls['loss'])
    assert counts == [1, 1, 1, 1, 2, 2, 3, 3, 4]
    assert task.calls['network'] == 9


def test_the_interval_follows_the_task_unless_it_is_set() -> None:
    assert synthesizer(Task(), detection_interval=None).detection_interval == 1
    assert synthesizer(Task(is_batched=False), detection_interval=None).detection_interval == DETECTION_INTERVAL
    assert synthesizer(Task(is_batched=False), detection_interval=2).detection_interval == 2


def test_a_kept_gradient_of_one_step_is_the_joint_gradient() -> None:
    """Without balance, both kinds of steps minimize the same sum."""
    gradients = [first_gradient(Task(), balance=False, detection_interval=interval)[0] for interval in (1, 5)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_joint_steps_measure_at_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task()
    maker = synthesizer(task)
    for prior in maker.priors:
        prior.attach(task.detector)
    step = OptimizationStep(maker, torch.rand(3, 3, *SIZE), list(LABELS))
    assert step.balance is not None
    measured = []
    measure = step.balance.measure
    monkeypatch.setattr(step.balance, 'measure', lambda *args: (measured.append(step.iteration), measure(*args)))
    for _ in range(2 * MEASURE_INTERVAL + 1):
        step(0.01)
    assert [iteration - 1 for iteration in measured] == [0, MEASURE_INTERVAL, 2 * MEASURE_INTERVAL]
