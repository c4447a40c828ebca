# SPDX-License-Identifier: Apache-2.0
"""How diverse the patches of an image look to a transformer: the feature prior of networks without BatchNorm.

PSAQ-ViT (Li et al. 2022): the self-attention of a trained transformer answers an image with patch features that differ
from each other, and noise with features that are all alike. The prior is, for every attention block, the differential
entropy of the distribution of cosine similarities between patches, negative: to minimize it raises the diversity.
:func:`similarity_entropy` is the math, :class:`PatchSimilarityPrior` watches a detector.
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

from mmzsq.errors import UserError
from mmzsq.registry import PRIORS
from mmzsq.synthesis.priors import Prior

MAX_PATCHES = 1024
"""Patches of a window that are compared; of more (global attention at high resolution), so many evenly spaced ones."""

DENSITY_FLOOR = 1e-6
"""Added to a density before its logarithm is taken: where no similarity is near, the entropy has a finite slope."""

FAR = 1e4
"""Stands for the similarity of pairs that are not compared: so far from every point that its kernel is 0."""


def similarity_entropy(features: Tensor, apart: Tensor, bandwidth: float, points: int) -> Tensor:
    """Differential entropy of the cosine similarities between the patches of each image.

    A Gaussian kernel density of all similarities of the image, read at ``points`` evenly spaced points from the least
    to the greatest of them, and -p log p integrated over these by the trapezoidal rule. The points are constants of
    the gradient. Points over all of [-1, 1] would lie 22 bandwidths (of 0.01) apart, and most of them where no
    similarity is: the kernels reach some 3 bandwidths, so nearly all pairs would have no gradient.

    Args:
        features: One vector a patch, shape (N, windows, patches, channels); N images.
        apart: Pairs not to be compared, boolean, symmetric, shape (windows, patches, patches); the same for all images.
        bandwidth: Standard deviation of the kernel, in units of similarity.
        points: Number of points, at least 2.

    Returns:
        Entropy in nats, shape (N,); 0 for an image without any pair.
    """
    unit = F.normalize(features, dim=-1, eps=1e-6)
    with torch.no_grad():
        low, high = similarity_range(unit, apart)
        span = torch.linspace(0, 1, points, device=unit.device, dtype=unit.dtype)
        grid = low[:, None] + (high - low)[:, None] * span
    density = similarity_density(unit, apart, grid, bandwidth)
    return torch.trapezoid(-density * (density + DENSITY_FLOOR).log(), grid, dim=1)


def similarity_range(unit: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest similarity of each image, shape (N,) each; arguments as of :func:`similarity_density`."""
    pairs = _pairs(apart)
    similarities, apart = _of_pairs(unit @ unit.mT, pairs), _of_pairs(apart, pairs)
    low = similarities.masked_fill(apart, math.inf).flatten(1).amin(1)
    high = similarities.masked_fill_(apart, -math.inf).flatten(1).amax(1)
    any_pair = low <= high
    return torch.where(any_pair, low, 0.0), torch.where(any_pair, high, 0.0)


def similarity_density(unit: Tensor, apart: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel density of the similarities of each image.

    Args:
        unit: Patch features of length 1, shape (N, windows, patches, channels).
        apart: Pairs not to be compared, boolean, symmetric, shape (windows, patches, patches).
        grid: Where the density is wanted, shape (N, points).
        bandwidth: Standard deviation of the kernel.

    Returns:
        The density, shape (N, points), differentiable with respect to ``unit``.
    """
    return _SimilarityDensity.apply(unit, apart, grid, bandwidth)


class _SimilarityDensity(torch.autograd.Function):
    """Keeps the features alone: similarities, a number for each pair, are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, apart: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(unit, apart, grid)
        ctx.bandwidth = bandwidth
        pairs = _pairs(apart)
        apart = _of_pairs(apart, pairs)
        similarities = _of_pairs(unit @ unit.mT, pairs).masked_fill_(apart, FAR).flatten(1)
        sums = [_kernel(similarities - point[:, None], bandwidth).sum(1) for point in grid.unbind(1)]
        return torch.stack(sums, 1) * _share_of_pair(apart, bandwidth)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_density: Tensor) -> tuple[Tensor, None, None, None]:
        unit, apart, grid = ctx.saved_tensors
        pairs = _pairs(apart)
        apart = _of_pairs(apart, pairs)
        similarities = _of_pairs(unit @ unit.mT, pairs).masked_fill_(apart, FAR).flatten(1)
        slopes = grad_density * _share_of_pair(apart, ctx.bandwidth) / -(ctx.bandwidth**2)
        grad = torch.zeros_like(similarities)
        for point, slope in zip(grid.unbind(1), slopes.unbind(1), strict=True):
            offset = similarities - point[:, None]
            grad.addcmul_(offset, _kernel(offset, ctx.bandwidth).mul_(slope[:, None]))
        patches = unit.shape[2]
        grad = grad.view(*unit.shape[:2], -1)
        grad = grad.new_zeros(*unit.shape[:2], patches**2).index_copy_(-1, pairs, grad).unflatten(-1, (patches, -1))
        # A similarity depends on both of its patches.
        return grad @ unit + grad.mT @ unit, None, None, None


def _pairs(apart: Tensor) -> Tensor:
    """Where each pair of patches stands, once, in a flattened (patches, patches) matrix."""
    patches = apart.shape[-1]
    first, second = torch.triu_indices(patches, patches, device=apart.device)
    return first * patches + second


def _of_pairs(matrices: Tensor, pairs: Tensor) -> Tensor:
    """Read ``pairs`` from matrices (..., patches, patches): shape (..., pairs)."""
    return matrices.flatten(-2).index_select(-1, pairs)


def _kernel(offset: Tensor, bandwidth: float) -> Tensor:
    """Gaussian of height 1; in two passes, where memory is what takes time."""
    return torch.addcmul(offset.new_zeros(()), offset, offset, value=-0.5 / bandwidth**2).exp_()


def _share_of_pair(apart: Tensor, bandwidth: float) -> Tensor:
    """What one pair adds to the density at its own similarity; ``apart`` of shape (windows, pairs)."""
    return 1 / ((~apart).sum().clamp(min=1) * (bandwidth * math.sqrt(2 * math.pi)))


def output_projection(module: nn.Module) -> nn.Linear | None:
    """The layer of an attention module that takes the concatenated heads; None if ``module`` is no such module.

    An attention module is what says into how many heads it splits its channels (``num_heads`` or
    ``num_attention_heads``) and owns a linear layer ``proj`` or ``out_proj``.
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
    """Attention modules of a detector's backbone, or of the whole of a network that has no ``backbone``.

    Elsewhere attention is between object queries, or words, and not between the patches of an image.
    """
    backbone = getattr(detector, 'backbone', detector)
    return [
        module
        for module in backbone.modules()
        if isinstance(module, nn.MultiheadAttention) or output_projection(module) is not None
    ]


@dataclass(frozen=True)
class _Block:
    """What one run of an attention module left: features (B, T, channels) in fp32, and which patches belong together.

    ``padding`` (B, T) is true where there is no patch; ``mask`` (windows, T, T) is negative where two are apart.
    """

    features: Tensor
    padding: Tensor | None
    mask: Tensor | None


@PRIORS.register_module()
class PatchSimilarityPrior(Prior):
    """Patch similarity entropy of every attention block of the backbone, negative; the mean over blocks and images.

    Attention modules are known by what they are (:func:`output_projection`), and what is compared is the input of
    their output projection, averaged over heads: one vector a patch. ``nn.MultiheadAttention`` does not show that
    input; there it is the output, in which the projection has summed over heads. Patches are compared within
    their window; all windows of an image make one distribution. Left out are the similarity of a patch with itself;
    patches that the additive ``mask`` (windows, T, T) of shifted windows separates; and zero rows of a module's input,
    with which windows are filled up beyond the border of the feature map. Every other token counts as a patch.

    Args:
        weight: Weight of the mean.
        bandwidth: Of the kernel density, in units of cosine similarity.
        points: At which the density is read, between the least and the greatest similarity in an image.
    """

    judges_features = True
    needs = 'attention in its backbone'

    def __init__(self, weight: float = 1.0, bandwidth: float = 0.01, points: int = 10) -> None:
        if bandwidth <= 0:
            raise UserError(f'bandwidth of PatchSimilarityPrior is above 0, not {bandwidth!r}')
        if not isinstance(points, int) or points < 2:
            raise UserError(f'points of PatchSimilarityPrior is a whole number of at least 2, not {points!r}')
        self.weight = weight
        self.bandwidth = bandwidth
        self.points = points
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._blocks: list[_Block] = []

    def applies_to(self, detector: nn.Module) -> bool:
        """Whether the backbone of ``detector`` has attention."""
        return bool(attention_modules(detector))

    def attach(self, detector: nn.Module) -> None:
        """Watch every attention module of the backbone of ``detector``.

        Raises:
            UserError: If there is none.
        """
        modules = attention_modules(detector)
        if not modules:
            raise UserError(
                'PatchSimilarityPrior needs attention in the backbone and this detector has none; '
                'remove it from zsq.synthesis.priors'
            )
        for module in modules:
            projection = output_projection(module)
            if isinstance(module, nn.MultiheadAttention) or projection is None:
                self._handles.append(module.register_forward_hook(self._record_output))
            else:
                self._handles.append(module.register_forward_pre_hook(self._note_inputs, with_kwargs=True))
                self._handles.append(projection.register_forward_pre_hook(partial(self._record_context, module)))

    def detach(self) -> None:
        """Remove all hooks and forget what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block what runs is not judged."""
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop what was seen since the last call."""
        self._inputs.clear()
        self._blocks.clear()

    def _note_inputs(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        """Entropies, shape (N,), of each block that ran since the last call, in order; forgets them.

        Args:
            num_images: N, the images of that forward.
        """
        blocks, self._blocks = self._blocks, []
        return [self._entropy(block, num_images) for block in blocks]

    def _entropy(self, block: _Block, num_images: int) -> Tensor:
        rows, patches = block.features.shape[:2]
        if rows % num_images:
            raise RuntimeError(f'{rows} windows of attention cannot be shared out among {num_images} images')
        # The windows of an image are next to each other.
        features = block.features.unflatten(0, (num_images, -1)).float()
        apart = torch.eye(patches, dtype=torch.bool, device=features.device).expand(features.shape[1], -1, -1)
        if block.padding is not None:
            padding = block.padding.unflatten(0, (num_images, -1)).all(0)
            apart = apart | padding[:, :, None] | padding[:, None, :]
        if block.mask is not None and block.mask.shape[0] == features.shape[1]:
            apart = apart | (block.mask < 0)
        return similarity_entropy(features, apart, self.bandwidth, self.points)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weighted penalty of the detector's forward on ``images``, a scalar.

        Raises:
            UserError: If the penalty has no gradient for images that want one.
        """
        with torch.autocast(images.device.type, enabled=False):
            entropies = self.block_entropies(len(images))
            if not entropies:
                raise RuntimeError('PatchSimilarityPrior saw no forward pass: attach it and run the detector first')
            if images.requires_grad and not all(entropy.requires_grad for entropy in entropies):
                raise UserError(
                    'PatchSimilarityPrior has no gradient: activation checkpointing hides what the attention sees; '
                    "set with_cp=False in the detector's backbone"
                )
            return -self.weight * torch.stack(entropies).mean()


def _thin_out(block: _Block) -> _Block:
    """Keep at most :data:`MAX_PATCHES` of each window's patches, evenly spaced."""
    patches = block.features.shape[1]
    if patches <= MAX_PATCHES:
        return block
    kept = torch.arange(MAX_PATCHES, device=block.features.device) * patches // MAX_PATCHES
    return _Block(
        block.features.index_select(1, kept),
        None if block.padding is None else block.padding.index_select(1, kept),
        None if block.mask is None else block.mask.index_select(1, kept).index_select(2, kept),
    )
