# SPDX-License-Identifier: Apache-2.0
"""Divisors of losses that cover all images of one weight update.

The images of an update may come in parts: in several processes, and in several batches whose gradients are accumulated
(``zsq.train.accumulate``). The gradients of the parts are averaged. This equals the gradient of one batch with all
images if each loss divides by the mean of its divisors over all parts, and weighs its means by the sizes of the parts.

Batches that are accumulated follow each other, so the first one would have to know the divisors of the last one.
:class:`UpdateParts` therefore runs what the divisors depend on for all parts first, and replays the means afterwards.

:func:`update_mean` is for losses that were written for it: all parts ask for the same means in the same order.
:func:`named_mean` is for those that were not, and only replays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from mmdet.utils import reduce_mean
from mmengine.dist import all_gather_object, get_world_size
from torch import Tensor


@dataclass
class NamedDivisors:
    """Divisors of one part by name.

    Attributes:
        images: Number of images of the part.
        values: The value of each call with a name.
        settings: Names of divisors that may be settings of the loss instead of numbers of the part.
    """

    images: int
    values: dict[str, list[float]] = field(default_factory=dict)
    settings: set[str] = field(default_factory=set)


def mean_divisors(parts: Sequence[NamedDivisors]) -> dict[str, list[float]]:
    """Average divisors over parts by name.

    A part that does not ask for a divisor has nothing to divide, so its divisor counts as 0. Not all calls
    with one name can be matched. If a loop over levels divides by the same number each time, the number of calls does
    not matter. Otherwise the calls are averaged one by one. A loop over images is left out, because the images of two
    parts do not belong together.

    Args:
        parts: The divisors of each part.

    Returns:
        By name, one mean for all calls or one for each call. A name that is missing has no mean: each call keeps its
        value.

    Example:
        >>> mean_divisors([NamedDivisors(2, {'boxes': [1, 1, 1]}), NamedDivisors(2, {'boxes': [3, 3]})])
        {'boxes': [2.0]}
    """
    means: dict[str, list[float]] = {}
    for name in sorted({name for part in parts for name in part.values}):
        calls = [part.values.get(name, []) for part in parts]
        if all(_are_equal(values) for values in calls):
            values = [values[0] for values in calls if values]
            setting = any(name in part.settings for part in parts) and _are_equal(values)
            if not setting:
                means[name] = [sum(values) / len(parts)]
        elif len({len(values) for values in calls}) == 1:
            per_image = all(
                part.images > 1 and len(values) % part.images == 0 for part, values in zip(parts, calls, strict=True)
            )
            if not per_image:
                means[name] = [sum(values) / len(parts) for values in zip(*calls, strict=True)]
    return means


def _are_equal(values: Sequence[float]) -> bool:
    """Return whether values differ by rounding alone, as sums in another order do."""
    return all(math.isclose(value, values[0], rel_tol=1e-5) for value in values)


class UpdateParts:
    """The parts of one update that this process runs, one after the other.

    Args:
        count: Number of these parts.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.is_recording = False
        self._recorded: list[list[Tensor]] = []
        self._named: list[NamedDivisors] = []
        self._means: list[Tensor] | None = None
        self._named_means: Mapping[str, list[float]] = {}
        self._replayed = 0
        self._calls: Counter[str] = Counter()

    @contextmanager
    def recording(self, images: int = 1) -> Iterator[None]:
        """Record the divisors of one part inside the block.

        Args:
            images: Number of images of the part.
        """
        self._recorded.append([])
        self._named.append(NamedDivisors(images))
        self.is_recording = True
        try:
            with _inside(self):
                yield
        finally:
            self.is_recording = False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Use the means over all parts inside the block. With several parts, all must have been recorded.

        With one part in each process, recording is needed for :func:`named_mean` alone.

        Raises:
            RuntimeError: If the block does not ask for as many means as were recorded for each part.
        """
        if self.count > 1 and self._means is None:
            self._means = self._average()
        if self._named:
            gathered = all_gather_object(self._named) if get_world_size() > 1 else [self._named]
            self._named_means = mean_divisors([part for parts in gathered for part in parts])
            self._named = []
        self._replayed = 0
        self._calls.clear()
        with _inside(self):
            yield
        if self._means is not None and self._replayed != len(self._means):
            raise RuntimeError(f'{len(self._means)} divisors were recorded, but {self._replayed} are used')

    def named_mean(self, name: str, value: float, setting: bool) -> float:
        """Return the mean of a value over all parts in all processes, see :func:`named_mean`."""
        if self.is_recording:
            part = self._named[-1]
            part.values.setdefault(name, []).append(value)
            if setting:
                part.settings.add(name)
            return value
        call = self._calls[name]
        self._calls[name] += 1
        means = self._named_means.get(name, [])
        if len(means) == 1:
            return means[0]
        return means[call] if call < len(means) else value

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over all parts in all processes; while recording, the value itself.

        A value must not depend on another mean.
        """
        if self.count == 1:
            return value if self.is_recording else reduce_mean(value)
        if self._means is None:
            # A copy, because the caller may clamp the value in place.
            self._recorded[-1].append(value.detach().clone())
            return value
        if self._replayed == len(self._means):
            raise RuntimeError(f'only {len(self._means)} divisors were recorded')
        self._replayed += 1
        return self._means[self._replayed - 1].clone()

    def _average(self) -> list[Tensor]:
        shapes = [[value.shape for value in part] for part in self._recorded]
        if len(shapes) != self.count or any(part != shapes[0] for part in shapes):
            raise RuntimeError('the parts of an update have different divisors')
        if not shapes[0]:
            return []
        means = [torch.stack(values).mean(0) for values in zip(*self._recorded, strict=True)]
        # One exchange for all.
        joined = reduce_mean(torch.cat([mean.flatten() for mean in means]))
        parts = joined.split([mean.numel() for mean in means])
        return [part.view_as(mean).to(mean.dtype) for part, mean in zip(parts, means, strict=True)]


_current: UpdateParts | None = None


@contextmanager
def _inside(parts: UpdateParts) -> Iterator[None]:
    global _current
    before, _current = _current, parts
    try:
        yield
    finally:
        _current = before


def update_mean(value: Tensor) -> Tensor:
    """Return the mean of a divisor over all parts of the update.

    Outside of an update, this is the mean over all processes, which must call it together.

    Args:
        value: The divisor of this part, any shape, without gradient.
    """
    return reduce_mean(value) if _current is None else _current.mean(value)


def mean_in_update(value: Tensor) -> Tensor:
    """Return :func:`update_mean` in an update, and the value itself outside: synthesis differs between processes.

    Args:
        value: The divisor of this part, any shape, without gradient.
    """
    return value if _current is None else _current.mean(value)


def named_mean(name: str, value: float, setting: bool = False) -> float:
    """Return the mean of a divisor for which not all parts must ask, see :func:`mean_divisors`.

    Outside of an update, and in one whose parts were not recorded, this is the value itself.

    Args:
        name: The same for the same divisor of each part. A part may use it for several calls.
        value: The divisor of this part.
        setting: Whether the value may be a setting of the loss. If it is the same in each part that uses it, it is kept
            as it is.
    """
    return value if _current is None else _current.named_mean(name, value, setting)


def is_recording() -> bool:
    """Return whether the divisors of a part are being recorded. Losses are then computed for nothing else."""
    return _current is not None and _current.is_recording


def part_count(in_update: bool = False) -> int:
    """Return the number of parts of the update in all processes.

    Args:
        in_update: Whether other processes count in an update only, see :func:`mean_in_update`.
    """
    if _current is None:
        return 1 if in_update else get_world_size()
    return _current.count * get_world_size()


def row_counts(rows: Sequence[int], device: torch.device, in_update: bool = False) -> Tensor | None:
    """Return the numbers of rows of tensors, (K,), or None if the update has one part.

    Args:
        rows: Number of rows of each of K tensors, such as images.
        device: Device of the result.
        in_update: See :func:`part_count`.
    """
    if part_count(in_update) == 1:
        return None
    # Filled on the device: a CUDA graph cannot contain a copy from the host.
    return torch.stack([torch.full((), float(count), device=device) for count in rows])


def row_shares(rows: Sequence[int], device: torch.device, in_update: bool = False) -> Tensor | None:
    """Return factors of means over rows, so that their average over the parts is the mean over the rows of all parts.

    Args:
        rows: See :func:`row_counts`.
        device: See :func:`row_counts`.
        in_update: See :func:`part_count`.

    Returns:
        The rows divided by their mean over all parts, (K,); None if there is one part.
    """
    counts = row_counts(rows, device, in_update)
    return None if counts is None else counts / update_mean(counts)
