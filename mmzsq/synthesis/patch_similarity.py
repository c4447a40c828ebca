# SPDX-License-Identifier: Apache-2.0
"""Diversity of patch features in a transformer: the feature prior of networks without BatchNorm.

PSAQ-ViT (Li et al. 2022): in a trained transformer, the patch features of an image differ from each other, while those
of noise are all alike. For each attention block, the prior is the negative differential entropy of the cosine
similarities between patches, so minimizing it increases diversity. :func:`similarity_entropy` computes the entropy, and
:class:`PatchSimilarityPrior` observes a detector.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mmzsq.argument_checks import checked_integer, checked_number
from mmzsq.errors import UserError
from mmzsq.registry import PRIORS
from mmzsq.synthesis.priors import Prior

MAX_PATCHES = 1024
"""Maximum number of patches compared in a window.

Larger windows (global attention at high resolution) are reduced to this many evenly spaced patches.
"""

DENSITY_FLOOR = 1e-6
"""Added to a density inside the logarithm, to keep the gradient of the entropy finite far from all similarities."""

FAR = 1e4
"""Similarity assigned to excluded pairs, so far from every grid point that their kernel is 0."""


def similarity_entropy(features: Tensor, excluded: Tensor, bandwidth: float, points: int) -> Tensor:
    """Differential entropy of the cosine similarities between the patches of each image.

    A Gaussian kernel density estimate of all similarities of the image is evaluated at ``points`` evenly spaced points
    between the smallest and the largest similarity, and -p log p is integrated over them by the trapezoidal rule. The
    points are constants in the gradient. Ten points over all of [-1, 1] would be 22 bandwidths (of 0.01) apart, most of
    them without similarities. A kernel reaches about 3 bandwidths, so nearly all pairs would get no gradient.

    Args:
        features: Patch features, shape (N, windows, patches, channels), for N images.
        excluded: Pairs not to compare, bool, symmetric, shape (windows, patches, patches), the same for all images.
        bandwidth: Standard deviation of the kernel, in units of similarity.
        points: Number of points, at least 2.

    Returns:
        Entropy in nats, shape (N,); 0 for an image without pairs.
    """
    unit = F.normalize(features, dim=-1, eps=1e-6)
    with torch.no_grad():
        low, high = similarity_range(unit, excluded)
        span = torch.linspace(0, 1, points, device=unit.device, dtype=unit.dtype)
        grid = low[:, None] + (high - low)[:, None] * span
    density = similarity_density(unit, excluded, grid, bandwidth)
    return torch.trapezoid(-density * (density + DENSITY_FLOOR).log(), grid, dim=1)


def similarity_range(unit: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest similarity of each image, shape (N,) each.

    Args:
        unit: As in :func:`similarity_density`.
        excluded: As in :func:`similarity_density`.
    """
    pairs = _pairs(excluded)
    similarities, excluded = _of_pairs(unit @ unit.mT, pairs), _of_pairs(excluded, pairs)
    low = similarities.masked_fill(excluded, math.inf).flatten(1).amin(1)
    high = similarities.masked_fill_(excluded, -math.inf).flatten(1).amax(1)
    any_pair = low <= high
    return torch.where(any_pair, low, 0.0), torch.where(any_pair, high, 0.0)


def similarity_density(unit: Tensor, excluded: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel density of the similarities of each image.

    Args:
        unit: Patch features of length 1, shape (N, windows, patches, channels).
        excluded: Pairs not to compare, bool, symmetric, shape (windows, patches, patches).
        grid: Points at which to evaluate the density, shape (N, points).
        bandwidth: Standard deviation of the kernel.

    Returns:
        The density, shape (N, points), differentiable with respect to ``unit``.
    """
    return _SimilarityDensity.apply(unit, excluded, grid, bandwidth)


class _SimilarityDensity(torch.autograd.Function):
    """Kernel density that saves only the features; the backward recomputes the similarities of all pairs."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, excluded: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(unit, excluded, grid)
        ctx.bandwidth = bandwidth
        pairs = _pairs(excluded)
        excluded = _of_pairs(excluded, pairs)
        similarities = _of_pairs(unit @ unit.mT, pairs).masked_fill_(excluded, FAR).flatten(1)
        sums = [_kernel(similarities - point[:, None], bandwidth).sum(1) for point in grid.unbind(1)]
        return torch.stack(sums, 1) * _share_of_pair(excluded, bandwidth)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_density: Tensor) -> tuple[Tensor, None, None, None]:
        unit, excluded, grid = ctx.saved_tensors
        pairs = _pairs(excluded)
        excluded = _of_pairs(excluded, pairs)
        similarities = _of_pairs(unit @ unit.mT, pairs).masked_fill_(excluded, FAR).flatten(1)
        slopes = grad_density * _share_of_pair(excluded, ctx.bandwidth) / -(ctx.bandwidth**2)
        grad = torch.zeros_like(similarities)
        for point, slope in zip(grid.unbind(1), slopes.unbind(1), strict=True):
            offset = similarities - point[:, None]
            grad.addcmul_(offset, _kernel(offset, ctx.bandwidth).mul_(slope[:, None]))
        patches = unit.shape[2]
        grad = grad.view(*unit.shape[:2], -1)
        grad = grad.new_zeros(*unit.shape[:2], patches**2).index_copy_(-1, pairs, grad).unflatten(-1, (patches, -1))
        # A similarity depends on both of its patches.
        return grad @ unit + grad.mT @ unit, None, None, None


def _pairs(excluded: Tensor) -> Tensor:
    """Indices of all unordered pairs of patches in a flattened (patches, patches) matrix."""
    patches = excluded.shape[-1]
    first, second = torch.triu_indices(patches, patches, device=excluded.device)
    return first * patches + second


def _of_pairs(matrices: Tensor, pairs: Tensor) -> Tensor:
    """Select ``pairs`` from matrices (..., patches, patches); returns (..., pairs)."""
    return matrices.flatten(-2).index_select(-1, pairs)


def _kernel(offset: Tensor, bandwidth: float) -> Tensor:
    """Gaussian with maximum 1, computed in two passes because memory bandwidth limits the speed."""
    return torch.addcmul(offset.new_zeros(()), offset, offset, value=-0.5 / bandwidth**2).exp_()


def _share_of_pair(excluded: Tensor, bandwidth: float) -> Tensor:
    """Contribution of one pair to the density at its own similarity; ``excluded`` has shape (windows, pairs)."""
    return 1 / ((~excluded).sum().clamp(min=1) * (bandwidth * math.sqrt(2 * math.pi)))


def output_projection(module: nn.Module) -> nn.Linear | None:
    """Return the linear layer that an attention module applies to its concatenated heads.

    A module counts as attention if it has a number of heads (``num_heads`` or ``num_attention_heads``) and a linear
    layer ``proj`` or ``out_proj``.

    Returns:
        The layer; None if ``module`` is not an attention module.
    """
    heads = _num_heads(module)
    for name in ('proj', 'out_proj'):
        layer = getattr(module, name, None)
        if heads is not None and isinstance(layer, nn.Linear) and layer.in_features % heads == 0:
            return layer
    return None


def _num_heads(module: nn.Module) -> int | None:
    heads = getattr(module, 'num_heads', getattr(module, 'num_attention_heads', None))
    return heads if isinstance(heads, int) else None


def attention_modules(detector: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a detector's backbone, or of the whole network if it has no ``backbone``.

    Attention outside of the backbone relates object queries or words instead of image patches.
    """
    backbone = getattr(detector, 'backbone', detector)
    return [
        module
        for module in backbone.modules()
        if isinstance(module, nn.MultiheadAttention) or output_projection(module) is not None
    ]


@dataclass(frozen=True)
class _Block:
    """Observation of one run of an attention module.

    Attributes:
        features: Patch features (B, T, channels), fp32.
        padding: True for padding tokens, (B, T).
        mask: Negative for pairs of patches that the attention separates, (windows, T, T).
    """

    features: Tensor
    padding: Tensor | None
    mask: Tensor | None


@PRIORS.register_module()
class PatchSimilarityPrior(Prior):
    """Negative patch similarity entropy of the attention blocks of the backbone, averaged over blocks and images.

    :func:`output_projection` identifies attention modules. The patch feature is the input of the output projection,
    averaged over heads. ``nn.MultiheadAttention`` does not expose that input; its output is used instead, where the
    projection has already combined the heads. Patches are compared within their window, and all windows of an image
    form one distribution. These are excluded: the similarity of a patch with itself; pairs that the additive ``mask``
    (windows, T, T) of shifted windows separates; and zero rows of the module's input, which pad windows at the border
    of the feature map. All other tokens count as patches.

    Args:
        weight: Weight of the mean.
        bandwidth: Bandwidth of the kernel density, in units of cosine similarity.
        points: Number of points at which the density is evaluated, between the smallest and the largest similarity of
            an image.

    Raises:
        UserError: If an argument is out of range.
    """

    is_feature_prior = True
    requirement = 'attention in its backbone'

    def __init__(self, weight: float = 1.0, bandwidth: float = 0.01, points: int = 10) -> None:
        self.weight = checked_number('PatchSimilarityPrior: weight', weight, 0)
        self.bandwidth = checked_number('PatchSimilarityPrior: bandwidth', bandwidth, 0)
        if bandwidth == 0:
            raise UserError('PatchSimilarityPrior: bandwidth must be above 0')
        self.points = checked_integer('PatchSimilarityPrior: points', points, 2)
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._blocks: list[_Block] = []

    def applies_to(self, detector: nn.Module) -> bool:
        """Return whether the backbone of ``detector`` has attention modules."""
        return bool(attention_modules(detector))

    def attach(self, detector: nn.Module) -> None:
        """Observe every attention module of the backbone of ``detector``.

        Raises:
            UserError: If the backbone has no attention module.
        """
        modules = attention_modules(detector)
        if not modules:
            raise UserError(
                'PatchSimilarityPrior needs attention in the backbone, but this detector has none; '
                'remove it from zsq.synthesis.priors'
            )
        for module in modules:
            projection = output_projection(module)
            if isinstance(module, nn.MultiheadAttention) or projection is None:
                self._handles.append(module.register_forward_hook(self._record_output))
            else:
                self._handles.append(module.register_forward_pre_hook(self._record_inputs, with_kwargs=True))
                self._handles.append(projection.register_forward_pre_hook(partial(self._record_context, module)))

    def detach(self) -> None:
        """Remove all hooks and discard the observations."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forwards inside the block; see :meth:`Prior.paused`."""
        try:
            yield
        finally:
            self.reset()

    def reset(self) -> None:
        """Discard the observations since the last call; see :meth:`Prior.reset`."""
        self._inputs.clear()
        self._blocks.clear()

    def _record_inputs(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        padding = (tokens == 0).all(-1).flatten(1)
        arguments = inspect.signature(attention.forward).bind(*args, **kwargs).arguments
        mask = arguments.get('mask', arguments.get('attn_mask'))
        patches = padding.shape[1]
        fits = isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape[1:] == (patches, patches)
        self._inputs[attention] = padding, mask if fits else None

    def _record_context(self, attention: nn.Module, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        heads = _num_heads(attention)
        features = inputs[0].unflatten(-1, (heads, -1)).mean(-2, dtype=torch.float32).flatten(1, -2)
        self._blocks.append(_thin_out(_Block(features, *self._inputs.pop(attention, (None, None)))))

    def _record_output(self, attention: nn.Module, _: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features = output[0] if attention.batch_first else output[0].transpose(0, 1)
        self._blocks.append(_thin_out(_Block(features, None, None)))

    def block_entropies(self, num_images: int) -> list[Tensor]:
        """Return the entropies, shape (N,), of each block that ran since the last call, in order; discards the blocks.

        Args:
            num_images: Number of images N of that forward.
        """
        blocks, self._blocks = self._blocks, []
        return [self._entropy(block, num_images) for block in blocks]

    def _entropy(self, block: _Block, num_images: int) -> Tensor:
        rows, patches = block.features.shape[:2]
        if rows % num_images:
            raise RuntimeError(f'{rows} windows of attention cannot be divided among {num_images} images')
        # The windows of an image are adjacent.
        features = block.features.unflatten(0, (num_images, -1)).float()
        excluded = torch.eye(patches, dtype=torch.bool, device=features.device).expand(features.shape[1], -1, -1)
        if block.padding is not None:
            padding = block.padding.unflatten(0, (num_images, -1)).all(0)
            excluded = excluded | padding[:, :, None] | padding[:, None, :]
        if block.mask is not None and block.mask.shape[0] == features.shape[1]:
            excluded = excluded | (block.mask < 0)
        return similarity_entropy(features, excluded, self.bandwidth, self.points)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the detector's forward on ``images``, a scalar.

        Raises:
            UserError: If the images require a gradient but the penalty has none.
        """
        with torch.autocast(images.device.type, enabled=False):
            entropies = self.block_entropies(len(images))
            if not entropies:
                raise RuntimeError('PatchSimilarityPrior saw no forward pass: attach it and run the detector first')
            if images.requires_grad and not all(entropy.requires_grad for entropy in entropies):
                raise UserError(
                    'PatchSimilarityPrior has no gradient: activation checkpointing hides the inputs of the attention; '
                    "set with_cp=False in the detector's backbone"
                )
            return -self.weight * torch.stack(entropies).mean()


def _thin_out(block: _Block) -> _Block:
    """Reduce each window to at most :data:`MAX_PATCHES` evenly spaced patches."""
    patches = block.features.shape[1]
    if patches <= MAX_PATCHES:
        return block
    kept = torch.arange(MAX_PATCHES, device=block.features.device) * patches // MAX_PATCHES
    return _Block(
        block.features.index_select(1, kept),
        None if block.padding is None else block.padding.index_select(1, kept),
        None if block.mask is None else block.mask.index_select(1, kept).index_select(2, kept),
    )
