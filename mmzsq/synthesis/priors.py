# SPDX-License-Identifier: Apache-2.0
"""What a natural image looks like to a trained detector, as differentiable penalties.

A prior watches a detector while it runs on synthetic images and returns one scalar. :class:`BNStatisticsPrior` is
DeepInversion's feature prior (Yin et al. 2020, eq. 4): the statistics that BatchNorm layers gathered on real images
are the only trace of these that a checkpoint carries. :class:`TotalVariationPrior` is its image prior (eq. 3).
:class:`~mmzsq.synthesis.patch_similarity.PatchSimilarityPrior` is the feature prior of networks without BatchNorm;
:func:`select_priors` combines what fits a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.errors import UserError
from mmzsq.fused_kernels import HAS_TRITON, fused_kernels_enabled
from mmzsq.registry import PRIORS
from mmzsq.synthesis.batch_norm import BatchNormStatisticsCollector, watched_layers

DEAD_CHANNEL_VARIANCE = 1e-12
"""Channels below this running variance never fired while training (some checkpoints hold 1e-27): no information."""


class Prior:
    """A penalty on synthetic images; watches a detector between :meth:`attach` and :meth:`detach`.

    Attributes:
        judges_features: Whether it compares features inside the detector with what the detector knows of real images.
        needs: What a detector must have for it, as a message to the user says it.
    """

    judges_features: ClassVar[bool] = False
    needs: ClassVar[str] = ''

    def applies_to(self, detector: nn.Module) -> bool:
        """Whether ``detector`` has what this prior needs."""
        return True

    def attach(self, detector: nn.Module) -> None:
        """Start to watch ``detector``; what its forwards produce from now on is what the next call judges."""

    def detach(self) -> None:
        """Stop watching."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside the block ``detector`` may run unseen; what a captured CUDA graph reads stays where it is."""
        return nullcontext()

    def forget(self) -> None:
        """Drop what was seen since the last call: a forward that did not come to its end is not judged."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar.

        Args:
            images: Synthetic images in [0, 1], shape (N, 3, H, W).
        """
        raise NotImplementedError


def select_priors(priors: Sequence[Prior], detector: nn.Module, require_features: bool) -> list[Prior]:
    """Leave out the priors that do not apply to a detector.

    Args:
        priors: To choose from.
        detector: What they are to watch.
        require_features: Whether at least one of the priors that judge features, if there are any, has to apply.

    Returns:
        Those that apply, in the given order.

    Raises:
        UserError: If a prior of features is required and none applies.
    """
    selected = [prior for prior in priors if prior.applies_to(detector)]
    needs = [prior.needs for prior in priors if prior.judges_features]
    if require_features and needs and not any(prior.judges_features for prior in selected):
        raise UserError(
            f'no feature prior of zsq.synthesis.priors applies: {type(detector).__name__} has '
            f'{"neither " if len(needs) > 1 else "no "}{" nor ".join(needs)}. Set '
            'zsq.synthesis.require_feature_prior=False to go on with the detection loss and the image prior alone'
        )
    return selected


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

    judges_features = True
    needs = 'BatchNorm layers with running statistics'

    def __init__(self, weight: float = 0.01, first_weight: float = 0.0, form: str = 'kl') -> None:
        if form not in ('l2', 'kl'):
            raise UserError(f"form of BNStatisticsPrior is 'l2' or 'kl', not {form!r}")
        self.weight = weight
        self.first_weight = first_weight
        self.form = form
        self._watch = BatchNormStatisticsCollector()
        self._layouts: dict[tuple[_BatchNorm, ...], _Layout] = {}

    def applies_to(self, detector: nn.Module) -> bool:
        """Whether ``detector`` has BatchNorm layers with running statistics."""
        return bool(watched_layers(detector))

    def attach(self, detector: nn.Module) -> None:
        """Watch the input of every BatchNorm layer of ``detector``."""
        if not watched_layers(detector):
            raise UserError(
                'BNStatisticsPrior needs BatchNorm layers with running statistics and this detector has none; '
                'remove it from zsq.synthesis.priors'
            )
        self._watch.attach(detector)

    def detach(self) -> None:
        """Remove all hooks."""
        self._watch.detach()
        self._layouts.clear()

    def paused(self) -> AbstractContextManager[None]:
        """Inside the block BatchNorm layers are not watched."""
        return self._watch.paused()

    def forget(self) -> None:
        """Drop what was seen since the last call."""
        self._watch.forget()

    def layer_distances(self) -> Tensor:
        """The un-weighted terms of the layers that ran since the last call, in order of execution; forgets them.

        A layer shared between pyramid levels runs several times in one forward; its running statistics are then a mean
        over levels, and so is what they are compared with.

        Returns:
            Shape (layers,), empty if none ran.
        """
        seen = self._watch.collect()
        if seen is None:
            return torch.zeros(0)
        key = tuple(seen.layers)
        if key not in self._layouts:
            self._layouts[key] = _Layout.of(seen.layers)
        layout = self._layouts[key]
        if self.form == 'l2':
            variances = layout.sum_by_layer((seen.variance - layout.variance).square())
            means = layout.sum_by_layer((seen.mean - layout.mean).square())
            return _norm(variances) + _norm(means)
        divergence = gaussian_kl(
            seen.mean, seen.variance, layout.mean, layout.variance.clamp(min=DEAD_CHANNEL_VARIANCE)
        )
        return layout.sum_by_layer(torch.where(layout.alive, divergence, 0.0)) / layout.num_alive

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the detector's forward on ``images``, a scalar."""
        distances = self.layer_distances()
        if not distances.numel():
            raise RuntimeError('BNStatisticsPrior saw no forward pass: attach it and run the detector first')
        total = distances.sum() * self.weight
        return total + distances[0] * self.first_weight if self.first_weight else total


class _Layout(NamedTuple):
    """What layers remember, one after the other, and which channel is whose: one computation for all of them.

    Attributes:
        mean: Running means, (sum of channels,).
        variance: Running variances, likewise.
        alive: Whether a channel ever fired, likewise.
        members: 1 where a channel is of a layer, (layers, sum of channels).
        num_alive: Channels of each layer that ever fired, at least 1, (layers,).
    """

    mean: Tensor
    variance: Tensor
    alive: Tensor
    members: Tensor
    num_alive: Tensor

    @classmethod
    def of(cls, layers: Sequence[_BatchNorm]) -> _Layout:
        mean = torch.cat([layer.running_mean.float() for layer in layers if layer.running_mean is not None])
        variance = torch.cat([layer.running_var.float() for layer in layers if layer.running_var is not None])
        alive = variance > DEAD_CHANNEL_VARIANCE
        members = torch.block_diag(*(torch.ones(1, layer.num_features, device=mean.device) for layer in layers))
        return cls(mean, variance, alive, members, (members * alive).sum(1).clamp(min=1))

    def sum_by_layer(self, values: Tensor) -> Tensor:
        """Sum (sum of channels,) over the channels of each layer, (layers,); in a fixed order."""
        return (self.members * values).sum(1)


def _norm(squares: Tensor) -> Tensor:
    """Square root with a gradient of 0 at 0."""
    return torch.where(squares > 0, squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt(), 0.0)


@PRIORS.register_module()
class TotalVariationPrior(Prior):
    """Differences between neighboring pixels: vertical, horizontal and both diagonals.

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
    if HAS_TRITON and fused_kernels_enabled() and images.is_cuda and images.dtype == torch.float32:
        from mmzsq.synthesis.kernels import MAX_VALUES, TotalVariation

        if images.numel() < MAX_VALUES:
            return TotalVariation.apply(images)
    total: Tensor = _TotalVariation.apply(images)
    return total


def directional_differences(images: Tensor) -> Tensor:
    """:func:`total_variation` as it is written down, the reference of its two faster forms."""
    vertical = images[:, :, 1:, :] - images[:, :, :-1, :]
    horizontal = images[:, :, :, 1:] - images[:, :, :, :-1]
    diagonal = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    anti_diagonal = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    return vertical.norm() + horizontal.norm() + diagonal.norm() + anti_diagonal.norm()


class _TotalVariation(torch.autograd.Function):
    """One buffer for the gradient; autograd makes a whole image of zeros for each of the eight slices."""

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
    """Views of the pixels and of those above, to the left, and on both diagonals."""
    return [
        (images[:, :, 1:, :], images[:, :, :-1, :]),
        (images[:, :, :, 1:], images[:, :, :, :-1]),
        (images[:, :, 1:, 1:], images[:, :, :-1, :-1]),
        (images[:, :, 1:, :-1], images[:, :, :-1, 1:]),
    ]
