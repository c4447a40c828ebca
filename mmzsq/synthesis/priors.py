# SPDX-License-Identifier: Apache-2.0
"""Differentiable penalties on synthetic images that do not look natural to a trained detector.

A prior observes a detector's forward on synthetic images and returns a scalar. :class:`BNStatisticsPrior` is the
feature prior of DeepInversion (Yin et al. 2020, eq. 4). It uses the running statistics of BatchNorm, the only
statistics of real images in a checkpoint. :class:`TotalVariationPrior` is the image prior of DeepInversion (eq. 3).
:class:`~mmzsq.synthesis.patch_similarity.PatchSimilarityPrior` is a feature prior for networks without BatchNorm.
:func:`select_priors` selects the priors that apply to a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.argument_checks import checked_number
from mmzsq.errors import UserError
from mmzsq.fused_kernels import HAS_TRITON, fused_kernels_enabled
from mmzsq.registry import PRIORS
from mmzsq.synthesis.batch_norm import BatchNormStatisticsCollector, batch_norm_layers

DEAD_CHANNEL_VARIANCE = 1e-12
"""Channels with a lower running variance were constant during training and carry no information.

Some checkpoints have running variances of 1e-27.
"""


class NoFeaturePriorError(UserError):
    """No feature prior applies to the detector, but one is required."""


class Prior:
    """A penalty on synthetic images; observes a detector between :meth:`attach` and :meth:`detach`.

    Attributes:
        is_feature_prior: Whether the penalty depends on features of the detector rather than on the images alone.
        requirement: Layers that a detector needs for this prior, as quoted in error messages.
        weight: Factor of the penalty. For an image prior with ``zsq.synthesis.balance``, the norm of its gradient,
            divided by that of the feature priors' gradient.
    """

    is_feature_prior: ClassVar[bool] = False
    requirement: ClassVar[str] = ''
    weight: float = 1.0

    def applies_to(self, detector: nn.Module) -> bool:
        """Return whether the prior can be used with ``detector``."""
        return True

    def attach(self, detector: nn.Module) -> None:
        """Start observing the forwards of ``detector``."""

    def detach(self) -> None:
        """Stop observing."""

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forwards of the detector inside the block; memory that a captured CUDA graph reads stays allocated."""
        return nullcontext()

    def reset(self) -> None:
        """Discard the observations since the last call, for example of a forward that failed."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the observed forward, a scalar.

        Args:
            images: Synthetic images in [0, 1], shape (N, 3, H, W).
        """
        raise NotImplementedError


def select_priors(priors: Sequence[Prior], detector: nn.Module, require_features: bool) -> list[Prior]:
    """Select the priors that apply to a detector.

    Args:
        priors: The candidates.
        detector: The detector to observe.
        require_features: Whether at least one feature prior must apply, if ``priors`` has any.

    Returns:
        The priors that apply, in the given order.

    Raises:
        NoFeaturePriorError: If a feature prior is required and none applies.
    """
    selected = [prior for prior in priors if prior.applies_to(detector)]
    requirements = [prior.requirement for prior in priors if prior.is_feature_prior]
    if require_features and requirements and not any(prior.is_feature_prior for prior in selected):
        raise NoFeaturePriorError(
            f'no feature prior of zsq.synthesis.priors applies: {type(detector).__name__} has '
            f'{"neither " if len(requirements) > 1 else "no "}{" nor ".join(requirements)}. Set '
            'zsq.synthesis.require_feature_prior=False to continue with the detection loss and the image prior alone'
        )
    return selected


def gaussian_kl(mean: Tensor, variance: Tensor, prior_mean: Tensor, prior_variance: Tensor) -> Tensor:
    """Elementwise KL divergence KL(N(mean, variance) || N(prior_mean, prior_variance)).

    Args:
        mean: Means, of any shape; all arguments have the same shape.
        variance: Variances, at least 0.
        prior_mean: Means of the reference.
        prior_variance: Variances of the reference, above 0.

    Returns:
        The divergence in nats, at least 0.
    """
    ratio = (variance + 1e-6 * prior_variance) / prior_variance
    return 0.5 * (ratio - 1 - ratio.log() + (mean - prior_mean).square() / prior_variance)


@PRIORS.register_module()
class BNStatisticsPrior(Prior):
    """Distance between batch statistics of synthetic images and the running statistics of BatchNorm layers.

    ``form='l2'`` is the paper's: for each layer, the Euclidean norm over channels of the difference of variances plus
    that of the difference of means, summed over layers. ``form='kl'`` is the mean over live channels of the Gaussian KL
    divergence (batch || running) of each layer, summed over layers. It does not depend on the scale of the features, so
    no layer dominates. Live channels have a running variance above :data:`DEAD_CHANNEL_VARIANCE`.

    Args:
        weight: Weight of the sum over all layers.
        first_weight: Weight of the first executed layer's term, in addition to ``weight``.
        form: ``'l2'`` or ``'kl'``.

    Raises:
        UserError: If a weight is below 0, or ``form`` is unknown.
    """

    is_feature_prior = True
    requirement = 'BatchNorm layers with running statistics'

    def __init__(self, weight: float = 0.01, first_weight: float = 0.0, form: str = 'kl') -> None:
        if form not in ('l2', 'kl'):
            raise UserError(f"BNStatisticsPrior: form must be 'l2' or 'kl', got {form!r}")
        self.weight = checked_number('BNStatisticsPrior: weight', weight, 0)
        self.first_weight = checked_number('BNStatisticsPrior: first_weight', first_weight, 0)
        self.form = form
        self._collector = BatchNormStatisticsCollector()
        self._running: dict[tuple[_BatchNorm, ...], _RunningStatistics] = {}

    def applies_to(self, detector: nn.Module) -> bool:
        """Return whether ``detector`` has BatchNorm layers with running statistics."""
        return bool(batch_norm_layers(detector))

    def attach(self, detector: nn.Module) -> None:
        """Observe the input of every BatchNorm layer of ``detector``.

        Raises:
            UserError: If the detector has no BatchNorm layer with running statistics.
        """
        if not batch_norm_layers(detector):
            raise UserError(
                'BNStatisticsPrior needs BatchNorm layers with running statistics, but this detector has none; '
                'remove it from zsq.synthesis.priors'
            )
        self._collector.attach(detector)

    def detach(self) -> None:
        """Stop observing and remove all hooks and patches."""
        self._collector.detach()
        self._running.clear()

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forwards inside the block; see :meth:`Prior.paused`."""
        return self._collector.paused()

    def reset(self) -> None:
        """Discard the observations since the last call; see :meth:`Prior.reset`."""
        self._collector.reset()

    def layer_distances(self) -> Tensor:
        """Return the unweighted terms of the layers that ran since the last call, in order of execution.

        A layer shared between pyramid levels runs several times in one forward. Its running statistics are averages
        over levels, so the batch statistics are averaged over its runs, too. The observations are then discarded.

        Returns:
            Shape (layers,), empty if none ran.
        """
        batch = self._collector.collect()
        if batch is None:
            return torch.zeros(0)
        key = tuple(batch.layers)
        if key not in self._running:
            self._running[key] = _RunningStatistics.of(batch.layers)
        running = self._running[key]
        if self.form == 'l2':
            variances = running.sum_by_layer((batch.variance - running.variance).square())
            means = running.sum_by_layer((batch.mean - running.mean).square())
            return _norm(variances) + _norm(means)
        divergence = gaussian_kl(
            batch.mean, batch.variance, running.mean, running.variance.clamp(min=DEAD_CHANNEL_VARIANCE)
        )
        return running.sum_by_layer(torch.where(running.is_live, divergence, 0.0)) / running.num_live

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the detector's forward on ``images``, a scalar."""
        distances = self.layer_distances()
        if not distances.numel():
            raise RuntimeError('BNStatisticsPrior saw no forward pass: attach it and run the detector first')
        total = distances.sum() * self.weight
        return total + distances[0] * self.first_weight if self.first_weight else total


class _RunningStatistics(NamedTuple):
    """Running statistics of several layers, concatenated so that one computation covers all layers.

    Attributes:
        mean: Running means, (sum of channels,).
        variance: Running variances, (sum of channels,).
        is_live: Whether a channel is live, (sum of channels,).
        members: 1 where a channel belongs to a layer, else 0, (layers, sum of channels).
        num_live: Number of live channels of each layer, at least 1, (layers,).
    """

    mean: Tensor
    variance: Tensor
    is_live: Tensor
    members: Tensor
    num_live: Tensor

    @classmethod
    def of(cls, layers: Sequence[_BatchNorm]) -> _RunningStatistics:
        means, variances = [], []
        for layer in layers:
            assert layer.running_mean is not None and layer.running_var is not None
            means.append(layer.running_mean.float())
            variances.append(layer.running_var.float())
        mean, variance = torch.cat(means), torch.cat(variances)
        is_live = variance > DEAD_CHANNEL_VARIANCE
        members = torch.block_diag(*(torch.ones(1, layer.num_features, device=mean.device) for layer in layers))
        return cls(mean, variance, is_live, members, (members * is_live).sum(1).clamp(min=1))

    def sum_by_layer(self, values: Tensor) -> Tensor:
        """Sum values (sum of channels,) over the channels of each layer, in a fixed order; returns (layers,)."""
        return (self.members * values).sum(1)


def _norm(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    return torch.where(squares > 0, squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt(), 0.0)


@PRIORS.register_module()
class TotalVariationPrior(Prior):
    """Total variation: differences between vertical, horizontal and diagonal neighbors.

    As in the authors' code, the differences of each direction give one Frobenius norm over the whole batch. The value
    therefore grows with the square root of the number of pixels.

    Args:
        weight: Weight of the sum of the four norms, at least 0.

    Raises:
        UserError: If the weight is not such a number.
    """

    def __init__(self, weight: float = 5e-4) -> None:
        self.weight = checked_number('TotalVariationPrior: weight', weight, 0)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of images (N, 3, H, W) in [0, 1], a scalar."""
        return self.weight * total_variation(images)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the Frobenius norms of the four directional differences of ``images`` (N, C, H, W)."""
    if HAS_TRITON and fused_kernels_enabled() and images.is_cuda and images.dtype == torch.float32:
        from mmzsq.synthesis.kernels import MAX_VALUES, TotalVariation

        if images.numel() < MAX_VALUES:
            return TotalVariation.apply(images)
    total: Tensor = _TotalVariation.apply(images)
    return total


def directional_differences(images: Tensor) -> Tensor:
    """Plain definition of :func:`total_variation`, the reference of its two faster implementations."""
    vertical = images[:, :, 1:, :] - images[:, :, :-1, :]
    horizontal = images[:, :, :, 1:] - images[:, :, :, :-1]
    diagonal = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    anti_diagonal = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    return vertical.norm() + horizontal.norm() + diagonal.norm() + anti_diagonal.norm()


class _TotalVariation(torch.autograd.Function):
    """Total variation with a single gradient buffer; autograd would allocate one for each of the eight slices."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        differences = [pixel - neighbor for pixel, neighbor in _neighbors(images)]
        norms = torch.stack([difference.norm() for difference in differences])
        ctx.shape = images.shape
        ctx.save_for_backward(norms, *differences)
        return norms.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        norms, *differences = ctx.saved_tensors
        factors = torch.where(norms > 0, grad / norms, 0.0)
        grad_images = differences[0].new_zeros(ctx.shape)
        for (pixel, neighbor), difference, factor in zip(_neighbors(grad_images), differences, factors, strict=True):
            pixel.addcmul_(difference, factor)
            neighbor.addcmul_(difference, factor, value=-1)
        return grad_images


def _neighbors(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of views: pixels, and their neighbors above, to the left, and on both diagonals."""
    return [
        (images[:, :, 1:, :], images[:, :, :-1, :]),
        (images[:, :, :, 1:], images[:, :, :, :-1]),
        (images[:, :, 1:, 1:], images[:, :, :-1, :-1]),
        (images[:, :, 1:, :-1], images[:, :, :-1, 1:]),
    ]
