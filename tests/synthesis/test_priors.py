# SPDX-License-Identifier: Apache-2.0
"""Priors against statistics worked out by numpy and torch.distributions."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.synthesis.batch_norm import batch_statistics
from mmzsq.synthesis.patch_similarity import PatchSimilarityPrior
from mmzsq.synthesis.priors import (
    BNStatisticsPrior,
    Prior,
    TotalVariationPrior,
    directional_differences,
    gaussian_kl,
    select_priors,
    total_variation,
)


class OutOfOrder(nn.Module):
    """Registers its layers in another order than it runs them, as a C3 block does."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_last = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn_first = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn_last(self.conv(self.bn_first(x)))


def build() -> OutOfOrder:
    torch.manual_seed(0)
    model = OutOfOrder().eval()
    for bn in (model.bn_first, model.bn_last):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return model


def run(prior: BNStatisticsPrior, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    prior.attach(model)
    try:
        model(images)
        return prior(images)
    finally:
        prior.detach()


def numpy_statistics(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = features.detach().double().numpy()
    return array.mean((0, 2, 3)), array.var((0, 2, 3))


def test_l2_form_is_the_papers_sum_with_the_first_executed_layer_weighted_apart() -> None:
    model, images = build(), torch.rand(2, 3, 8, 8)
    inputs = {model.bn_first: images, model.bn_last: model.conv(model.bn_first(images))}
    terms = []
    for bn, features in inputs.items():
        mean, variance = numpy_statistics(features)
        terms.append(np.linalg.norm(variance - bn.running_var.numpy()) + np.linalg.norm(mean - bn.running_mean.numpy()))
    prior = BNStatisticsPrior(weight=0.01, first_weight=2.0, form='l2')
    assert float(run(prior, model, images)) == pytest.approx(0.01 * sum(terms) + 2.0 * terms[0], rel=1e-5)


def test_kl_form_is_the_mean_over_channels_summed_over_layers() -> None:
    model, images = build(), torch.rand(2, 3, 8, 8)
    inputs = {model.bn_first: images, model.bn_last: model.conv(model.bn_first(images))}
    expected = 0.0
    for bn, features in inputs.items():
        mean, variance = (torch.from_numpy(value) for value in numpy_statistics(features))
        batch = Normal(mean, variance.sqrt())
        expected += float(kl_divergence(batch, Normal(bn.running_mean.double(), bn.running_var.double().sqrt())).mean())
    assert float(run(BNStatisticsPrior(weight=1.0, form='kl'), model, images)) == pytest.approx(expected, rel=1e-4)


def test_is_zero_where_the_batch_has_the_running_statistics() -> None:
    model, images = build(), torch.rand(4, 3, 8, 8)
    for bn, features in ((model.bn_first, lambda: images), (model.bn_last, lambda: model.conv(model.bn_first(images)))):
        mean, variance = numpy_statistics(features())
        bn.running_mean.copy_(torch.from_numpy(mean))
        bn.running_var.copy_(torch.from_numpy(variance))
    for form in ('l2', 'kl'):
        assert float(run(BNStatisticsPrior(weight=1.0, form=form), model, images)) < 1e-5


def test_kl_form_averages_over_live_channels_only() -> None:
    model, images = build(), torch.rand(2, 3, 8, 8)
    model.bn_last.running_var[1] = 1e-30
    inputs = {model.bn_first: images, model.bn_last: model.conv(model.bn_first(images))}
    expected = 0.0
    for bn, features in inputs.items():
        mean, variance = (torch.from_numpy(value) for value in numpy_statistics(features))
        running = Normal(bn.running_mean.double(), bn.running_var.double().sqrt())
        divergences = kl_divergence(Normal(mean, variance.sqrt()), running)
        live = [0, 2, 3] if bn is model.bn_last else [0, 1, 2]
        expected += float(divergences[live].mean())
    assert float(run(BNStatisticsPrior(weight=1.0, form='kl'), model, images)) == pytest.approx(expected, rel=1e-4)


def test_dead_channels_get_no_gradient_and_break_none() -> None:
    bn = nn.BatchNorm2d(3).eval()
    bn.running_var[1] = 1e-30
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    run(BNStatisticsPrior(form='kl'), bn, images).backward()
    assert torch.isfinite(images.grad).all()
    assert not images.grad[:, 1].any() and images.grad[:, 0].any() and images.grad[:, 2].any()


def test_a_layer_without_dead_channels_is_not_affected_by_one_of_only_dead_channels() -> None:
    model, images = build(), torch.rand(2, 3, 8, 8)
    model.bn_last.running_var.fill_(1e-30)
    prior = BNStatisticsPrior(form='kl')
    prior.attach(model)
    model(images)
    first, last = prior.layer_distances().tolist()
    assert first > 0 and last == 0


def test_a_layer_shared_between_scales_is_compared_once() -> None:
    bn = nn.BatchNorm2d(2).eval()
    prior = BNStatisticsPrior(form='l2')
    prior.attach(bn)
    bn(torch.zeros(1, 2, 4, 4))
    bn(torch.ones(1, 2, 2, 2))
    (distance,) = prior.layer_distances()
    # mean over both calls: mean 0.5, variance 0, against mean 0 and variance 1
    assert float(distance) == pytest.approx(0.5 * 2**0.5 + 2**0.5)


def test_detached_prior_sees_nothing() -> None:
    model = build()
    prior = BNStatisticsPrior()
    run(prior, model, torch.rand(1, 3, 8, 8))
    model(torch.rand(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match='no forward'):
        prior(torch.rand(1, 3, 8, 8))


def test_a_detector_without_batchnorm_is_named_as_the_problem() -> None:
    with pytest.raises(UserError, match='has none'):
        BNStatisticsPrior().attach(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3)))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserError, match="'l2' or 'kl'"):
        BNStatisticsPrior(form='l1')


def test_gaussian_kl_agrees_with_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, prior_mean = torch.randn(2, 100).double()
    variance, prior_variance = torch.rand(2, 100).double() + 0.1
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(prior_mean, prior_variance.sqrt()))
    torch.testing.assert_close(gaussian_kl(mean, variance, prior_mean, prior_variance), expected, rtol=1e-4, atol=1e-5)


def test_total_variation_of_a_hand_worked_image() -> None:
    image = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    # vertical (2, 3), horizontal (1, 2), diagonal 4, anti-diagonal 2-1=1
    expected = 13**0.5 + 5**0.5 + 4 + 1
    assert float(TotalVariationPrior(weight=0.5)(image)) == pytest.approx(0.5 * expected)
    assert float(TotalVariationPrior()(torch.full((2, 3, 5, 5), 0.3))) == 0


def test_total_variation_and_its_gradient_are_those_of_autograd() -> None:
    images = torch.rand(2, 3, 7, 5)
    # Columns of one color: the norm of vertical differences is 0, and so is its gradient.
    for case in (images, images[:, :, :1].expand_as(images)):
        grads = []
        for function, dtype in ((total_variation, torch.float32), (directional_differences, torch.float64)):
            variable = case.detach().to(dtype).clone().requires_grad_()
            value = function(variable)
            (3 * value).backward()
            grads.append((value.double(), variable.grad.double()))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'))]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_statistics_and_their_gradient_are_those_of_autograd_in_double(
    device: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    features = (torch.randn(3, 5, 6, 4) * 2 + 1).to(device, dtype).to(memory_format=torch.channels_last)
    weights = torch.randn(2, 5, device=device)
    reference = features.double().requires_grad_()
    expected = torch.var_mean(reference, (0, 2, 3), correction=0)[::-1]
    (torch.stack(expected) * weights.double()).sum().backward()
    features.requires_grad_()
    statistics = batch_statistics(features)
    assert statistics[0].dtype == statistics[1].dtype == torch.float32
    (torch.stack(statistics) * weights).sum().backward()
    for got, want in zip(statistics, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.grad.double(), reference.grad, rtol=tolerance, atol=tolerance * 0.02)


# Selection of priors for a detector

WITH_BATCHNORM = dict(neck=nn.BatchNorm2d(4))
WITH_ATTENTION = dict(backbone=nn.MultiheadAttention(4, 2))
WITH_GROUPNORM = dict(backbone=nn.Conv2d(3, 4, 1), bbox_head=nn.GroupNorm(2, 4))
WITHOUT_STATISTICS = dict(backbone=nn.BatchNorm2d(4, track_running_stats=False))


def priors() -> list[Prior]:
    return [BNStatisticsPrior(), PatchSimilarityPrior(), TotalVariationPrior()]


@pytest.mark.parametrize(
    ('parts', 'expected'),
    [
        (WITH_BATCHNORM, ['BNStatisticsPrior', 'TotalVariationPrior']),
        (WITH_ATTENTION, ['PatchSimilarityPrior', 'TotalVariationPrior']),
        (WITH_BATCHNORM | WITH_ATTENTION, ['BNStatisticsPrior', 'PatchSimilarityPrior', 'TotalVariationPrior']),
        (WITH_BATCHNORM | WITH_GROUPNORM, ['BNStatisticsPrior', 'TotalVariationPrior']),
        (dict(backbone=nn.SyncBatchNorm(4)), ['BNStatisticsPrior', 'TotalVariationPrior']),
    ],
)
def test_priors_that_fit_the_detector_are_combined(parts: dict[str, nn.Module], expected: list[str]) -> None:
    selected = select_priors(priors(), nn.ModuleDict(parts), require_features=True)
    assert [type(prior).__name__ for prior in selected] == expected


@pytest.mark.parametrize('parts', [WITH_GROUPNORM, WITHOUT_STATISTICS])
def test_a_missing_feature_prior_is_an_error_unless_allowed(parts: dict[str, nn.Module]) -> None:
    detector = nn.ModuleDict(parts)
    message = (
        'neither BatchNorm layers with running statistics nor attention in its backbone. '
        'Set zsq.synthesis.require_feature_prior=False'
    )
    with pytest.raises(UserError, match=message):
        select_priors(priors(), detector, require_features=True)
    with pytest.raises(UserError, match='has no BatchNorm layers with running statistics. Set'):
        select_priors([BNStatisticsPrior()], detector, require_features=True)
    (left,) = select_priors(priors(), detector, require_features=False)
    assert isinstance(left, TotalVariationPrior)


def test_no_feature_prior_is_required_if_none_is_configured() -> None:
    prior = TotalVariationPrior()
    assert select_priors([prior], nn.ModuleDict(WITH_GROUPNORM), require_features=True) == [prior]


class FakeTask(NamedTuple):
    """The part of a task that the constructor of the generator reads."""

    detector: nn.Module


@pytest.mark.parametrize('options', [dict(), dict(require_feature_prior=True), dict(require_feature_prior=False)])
def test_a_generator_uses_applicable_priors_and_lists_the_others(options: dict[str, bool]) -> None:
    synthesis = dict(
        relabel=None,
        synthesize=dict(image_size=32, iterations=1),
        priors=[dict(type=f'mmzsq.{type(prior).__name__}', weight=0.5) for prior in priors()],
        **options,
    )

    def build(parts: dict[str, nn.Module]) -> CalibrationSetGenerator:
        sampler = dict(type='mmzsq.SingleBoxSampler')
        return CalibrationSetGenerator(FakeTask(nn.ModuleDict(parts)), synthesis, sampler, batch_size=1, seed=0)

    generator = build(WITH_ATTENTION)
    assert [type(prior).__name__ for prior in generator.priors_left_out] == ['BNStatisticsPrior']
    used = generator.synthesizer.priors
    assert [type(prior).__name__ for prior in used] == ['PatchSimilarityPrior', 'TotalVariationPrior']
    if options.get('require_feature_prior', True):
        with pytest.raises(UserError, match='require_feature_prior'):
            build(WITH_GROUPNORM)
    else:
        assert len(build(WITH_GROUPNORM).priors_left_out) == 2


@pytest.mark.parametrize('preset', ['default', 'paper'])
def test_presets_have_both_feature_priors_and_require_one(preset: str) -> None:
    synthesis = complete_section(dict(preset=preset))['synthesis']
    types = [prior['type'] for prior in synthesis['priors']]
    assert types == ['mmzsq.BNStatisticsPrior', 'mmzsq.PatchSimilarityPrior', 'mmzsq.TotalVariationPrior']
    assert synthesis['require_feature_prior'] is True
    asked = complete_section(dict(preset=preset, synthesis=dict(require_feature_prior=False)))
    assert asked['synthesis']['require_feature_prior'] is False
