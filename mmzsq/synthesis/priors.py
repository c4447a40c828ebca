# SPDX-License-Identifier: Apache-2.0
"""What a natural image looks like to a trained detector, as differentiable penalties.

A prior watches a detector while it runs on synthetic images and returns one scalar. :class:`BNStatisticsPrior` is
DeepInversion's feature prior (Yin et al. 2020, eq. 4): the statistics that BatchNorm layers gathered on real images
are the only trace of these that a checkpoint carries. :class:`TotalVariationPrior` is its image prior (eq. 3).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mmzsq.errors import UserError
from mmzsq.registry import PRIORS

DEAD_CHANNEL_VARIANCE = 1e-12
"""Channels below this running variance never fired while training (some checkpoints hold 1e-27): no information."""


class Prior:
    """A penalty on synthetic images; watches a detector between :meth:`attach` and :meth:`detach`."""

    def attach(self, detector: nn.Module) -> None:
        """Start to watch ``detector``; what its forwards produce from now on is what the next call judges."""

    def detach(self) -> None:
        """Stop watching."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar.

        Args:
            images: Synthetic images in [0, 1], shape (N, 3, H, W).
        """
        raise NotImplementedError


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, in fp32 whatever the type of ``features``.

    Args:
        features: Shape (N, C, ...).

    Returns:
        Mean and variance, shape (C,) each.
    """
    mean, variance = _BatchStatistics.apply(features)
    return mean, variance


class _BatchStatistics(torch.autograd.Function):
    """One pass over the features forward, one backward.

    On CUDA by the operators of SyncBatchNorm, which accumulate bf16 in fp32 without a copy of the features.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        if features.is_cuda:
            mean, inverse_deviation = torch.batch_norm_stats(features, 0.0)
            variance = inverse_deviation.square().reciprocal()
        else:
            dims = [dim for dim in range(features.dim()) if dim != 1]
            variance, mean = torch.var_mean(features.float(), dim=dims, correction=0)
        ctx.save_for_backward(features, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        features, mean = ctx.saved_tensors
        count = features.numel() // features.shape[1]
        slope, offset = 2 * grad_variance / count, grad_mean / count
        if features.is_cuda:
            return torch.batch_norm_elemt(features, slope, offset, mean, torch.ones_like(mean), 0.0)
        shape = (1, -1, *[1] * (features.dim() - 2))
        grad = (features - mean.view(shape)) * slope.view(shape) + offset.view(shape)
        return grad.to(features.dtype)


def gaussian_kl(mean: Tensor, variance: Tensor, prior_mean: Tensor, prior_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(prior_mean, prior_variance)) for each element.

    Args:
        mean: Any shape, like all others.
        variance: At least 0.
        prior_mean: Of the reference.
        prior_variance: Of the reference, above 0.

    Returns:
        The divergence in nats, at least 0.
    """
    ratio = (variance + 1e-6 * prior_variance) / prior_variance
    return 0.5 * (ratio - 1 - ratio.log() + (mean - prior_mean).square() / prior_variance)


@PRIORS.register_module()
class BNStatisticsPrior(Prior):
    """Distance between the statistics of a synthetic batch and those that BatchNorm layers remember.

    ``form='l2'`` is the paper's: for every layer the Euclidean norms over channels of the differences of variances and
    of means, summed over layers. ``form='kl'`` is, for every layer, the mean over channels of the Gaussian KL
    divergence (batch || running), summed over layers: free of the scale of the features, so that no layer dominates.

    Args:
        weight: Weight of the sum over all layers.
        first_weight: Weight of the first layer's term, on top of ``weight``.
        form: ``'l2'`` or ``'kl'``.

    Raises:
        UserError: From :meth:`attach`, if the detector has no BatchNorm layer with running statistics.
    """

    def __init__(self, weight: float = 0.01, first_weight: float = 0.0, form: str = 'kl') -> None:
        if form not in ('l2', 'kl'):
            raise UserError(f"form of BNStatisticsPrior is 'l2' or 'kl', not {form!r}")
        self.weight = weight
        self.first_weight = first_weight
        self.form = form
        self._handles: list[RemovableHandle] = []
        self._seen: OrderedDict[_BatchNorm, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def attach(self, detector: nn.Module) -> None:
        """Watch the input of every BatchNorm layer of ``detector``."""
        layers = [m for m in detector.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if not layers:
            raise UserError(
                'BNStatisticsPrior needs BatchNorm layers with running statistics and this detector has none; '
                'remove it from zsq.synthesis.priors'
            )
        self._handles = [layer.register_forward_pre_hook(self._record) for layer in layers]

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen.clear()

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A layer shared between pyramid levels runs several times in one forward; its running statistics are then a
        # mean over levels, and so is what they are compared with.
        self._seen.setdefault(layer, []).append(batch_statistics(inputs[0]))  # type: ignore[arg-type]

    def layer_distances(self) -> list[Tensor]:
        """The un-weighted term of each layer that ran since the last call, in order of execution; forgets them."""
        distances = []
        for layer, statistics in self._seen.items():
            mean = torch.stack([mean for mean, _ in statistics]).mean(0)
            variance = torch.stack([variance for _, variance in statistics]).mean(0)
            distances.append(self._distance(mean, variance, layer))
        self._seen.clear()
        return distances

    def _distance(self, mean: Tensor, variance: Tensor, layer: _BatchNorm) -> Tensor:
        assert layer.running_mean is not None and layer.running_var is not None
        prior_mean, prior_variance = layer.running_mean.float(), layer.running_var.float()
        if self.form == 'l2':
            return (variance - prior_variance).norm() + (mean - prior_mean).norm()
        alive = prior_variance > DEAD_CHANNEL_VARIANCE
        divergence = gaussian_kl(mean, variance, prior_mean, prior_variance.clamp(min=DEAD_CHANNEL_VARIANCE))
        return torch.where(alive, divergence, 0.0).sum() / alive.sum().clamp(min=1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the detector's forward on ``images``, a scalar."""
        distances = self.layer_distances()
        if not distances:
            raise RuntimeError('BNStatisticsPrior saw no forward pass: attach it and run the detector first')
        total = torch.stack(distances).sum() * self.weight
        return total + distances[0] * self.first_weight if self.first_weight else total


@PRIORS.register_module()
class TotalVariationPrior(Prior):
    """Differences between neighbouring pixels: vertical, horizontal and both diagonals.

    Each direction's differences give one Frobenius norm over the whole batch (the paper's code), so the value grows
    with the square root of the number of pixels.

    Args:
        weight: Weight of the sum of the four norms.
    """

    def __init__(self, weight: float = 5e-4) -> None:
        self.weight = weight

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar, of images (N, 3, H, W) in [0, 1]."""
        return self.weight * total_variation(images)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the Frobenius norms of the four directional differences of ``images`` (N, C, H, W)."""
    vertical = images[:, :, 1:, :] - images[:, :, :-1, :]
    horizontal = images[:, :, :, 1:] - images[:, :, :, :-1]
    diagonal = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    anti_diagonal = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    return vertical.norm() + horizontal.norm() + diagonal.norm() + anti_diagonal.norm()
