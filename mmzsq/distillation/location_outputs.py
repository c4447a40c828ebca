# SPDX-License-Identifier: Apache-2.0
"""Outputs of a dense head by location, in the form in which they are compared.

A location is one prior of the head: an anchor, a point or a grid cell. :mod:`~mmzsq.distillation.location_readers`
makes these outputs from the maps of each kind of head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar('T')


class MapsError(Exception):
    """The maps of a head do not have the layout of its class. The message is a clause."""


class MaskGroup(NamedTuple):
    """Masks of successive locations; all have one size.

    Attributes:
        start: Index of the first location.
        length: Number of locations.
        logits: Returns the logits (N, K, h, w) of the masks of K locations of each image, from indices (N, K) that
            count from ``start``.
    """

    start: int
    length: int
    logits: Callable[[Tensor], Tensor]


class LocationOutputs(NamedTuple):
    """Outputs of a dense head at its P locations, in float32.

    Attributes:
        classes: Class logits (N, P, C). With a softmax, the last one is the background.
        factor: Logits of the factor of the class scores, such as objectness or centerness, (N, P), or None.
        bboxes: Decoded boxes (N, P, 4), xyxy in one unit, not clipped; several if the head refines its boxes.
        sides: Logits of the distributions of the box's four distances, (N, P, 4, K), or None.
        regressions: Values of boxes that are not decoded, each (N, P, K).
        masks: Groups of masks.
        coefficients: Values of masks that are not composed, each (N, P, K).
        maps: Maps of masks that belong to no location, any shapes.
    """

    classes: Tensor
    factor: Tensor | None = None
    bboxes: tuple[Tensor, ...] = ()
    sides: Tensor | None = None
    regressions: tuple[Tensor, ...] = ()
    masks: tuple[MaskGroup, ...] = ()
    coefficients: tuple[Tensor, ...] = ()
    maps: tuple[Tensor, ...] = ()


class Constants:
    """Tensors that depend only on the head, the sizes of its maps and the device, such as priors.

    MMDetection copies parts of them from the host on every call. A CUDA graph cannot contain such a copy.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of ``key``; the first call makes it."""
        if key not in self._values:
            with torch.no_grad():
                self._values[key] = make()
        return self._values[key]


def rows(levels: Sequence[Tensor], channels: int) -> Tensor:
    """Join the maps of all levels by location.

    Args:
        levels: Maps (N, A * channels, H, W), which may differ in A, H and W.
        channels: Number of values of each of the A priors of a cell.

    Returns:
        Shape (N, P, channels), float32; ordered by level, row, column and prior, as MMDetection orders priors.

    Raises:
        MapsError: If ``channels`` does not divide the number of channels of a map.
    """
    for level in levels:
        if level.dim() != 4 or level.shape[1] % channels:
            raise MapsError(f'a map of shape {tuple(level.shape)} does not hold {channels} values for each location')
    flat = [level.float().permute(0, 2, 3, 1).reshape(len(level), -1, channels) for level in levels]
    return torch.cat(flat, 1)


def split_levels(maps: Sequence[Tensor], levels: int, kinds: int) -> list[list[Tensor]]:
    """Split the maps of one forward pass into kinds. Maps of later passes are ignored.

    Args:
        maps: Maps of all levels of the first kind, then of the second kind, and so on.
        levels: Number of levels.
        kinds: Number of kinds.

    Raises:
        MapsError: If there are too few maps, or maps of one level differ in size.
    """
    if len(maps) < levels * kinds:
        raise MapsError(f'{len(maps)} maps were returned, but {kinds} kinds on {levels} levels are expected')
    groups = [list(maps[kind * levels : (kind + 1) * levels]) for kind in range(kinds)]
    for group in groups[1:]:
        if any(a.shape[-2:] != b.shape[-2:] for a, b in zip(group, groups[0], strict=True)):
            raise MapsError('maps of one level differ in size')
    return groups


def map_sizes(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return height and width of each map."""
    return [(level.shape[-2], level.shape[-1]) for level in levels]


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Select locations of each image.

    Args:
        values: Values of all locations, (N, P, ...).
        indices: Locations (N, K), int64.

    Returns:
        Shape (N, K, ...).
    """
    wide = indices.reshape(*indices.shape, *[1] * (values.dim() - 2)).expand(*indices.shape, *values.shape[2:])
    return values.gather(1, wide)


def joint_logits(classes: Tensor, factor: Tensor) -> Tensor:
    """Return the logits of the product of two probabilities given by logits.

    The odds of ``sigmoid(c) * sigmoid(f)`` are ``exp(c + f) / (1 + exp(c) + exp(f))``.

    Args:
        classes: Logits, (..., C).
        factor: Logits of the factor, (...).

    Returns:
        Shape (..., C).

    Example:
        >>> joint_logits(torch.tensor([[0.0]]), torch.tensor([0.0])).sigmoid()
        tensor([[0.2500]])
    """
    factor = factor[..., None]
    larger = torch.maximum(classes, factor).clamp(min=0)
    total = (-larger).exp() + (classes - larger).exp() + (factor - larger).exp()
    return classes + factor - larger - total.log()


def linear_masks(coefficients: Tensor, prototypes: Tensor) -> MaskGroup:
    """Masks that are linear combinations of prototypes, as in YOLACT and SOLOv2.

    Args:
        coefficients: Shape (N, P, K).
        prototypes: Shape (N, K, h, w).
    """
    height, width = prototypes.shape[2:]

    def logits(indices: Tensor) -> Tensor:
        return (take(coefficients, indices) @ prototypes.flatten(2)).unflatten(2, (height, width))

    return MaskGroup(0, coefficients.shape[1], logits)


def dynamic_masks(
    kernels: Tensor, features: Tensor, offsets: Callable[[Tensor], Tensor], parse: Callable[[Tensor], Any]
) -> MaskGroup:
    """Masks from a small network of 1x1 convolutions for each location, as in CondInst and RTMDet-Ins.

    Args:
        kernels: Parameters of each location's network, (N, P, K).
        features: Input of all networks, (N, D, h, w).
        offsets: Returns the position of each pixel relative to locations, (N, K, 2, h, w), from indices (N, K).
        parse: The head's method that splits parameters (M, K) into the weights and biases of all layers.
    """
    height, width = features.shape[2:]

    def logits(indices: Tensor) -> Tensor:
        count = indices.shape[1]
        shared = features[:, None].expand(-1, count, -1, -1, -1)
        hidden = torch.cat([offsets(indices), shared], 2).flatten(3).flatten(0, 1)
        weights, biases = parse(take(kernels, indices).flatten(0, 1))
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if number:
                hidden = hidden.relu()
            hidden = torch.baddbmm(
                bias.reshape(len(hidden), -1, 1), weight.reshape(len(hidden), -1, hidden.shape[1]), hidden
            )
        return hidden.reshape(len(indices), count, height, width)

    return MaskGroup(0, kernels.shape[1], logits)


def direct_masks(levels: Sequence[Tensor]) -> tuple[MaskGroup, ...]:
    """Masks that the head returns for each location, as in SOLO.

    Args:
        levels: Mask logits of each level, (N, P of the level, h, w).
    """
    starts = accumulate((level.shape[1] for level in levels[:-1]), initial=0)
    return tuple(
        MaskGroup(start, level.shape[1], partial(take, level.float()))
        for start, level in zip(starts, levels, strict=True)
    )
