# SPDX-License-Identifier: Apache-2.0
"""Divisors of losses that cover all images of one weight update.

The images of an update may come in parts: in several processes, and in several batches whose gradients are accumulated
(``zsq.train.accumulate``). The gradients of the parts are averaged. This equals the gradient of one batch with all
images if each loss divides by the mean of its divisors over all parts, and weighs its means by the sizes of the parts.

Batches that are accumulated follow each other, so the first one would have to know the divisors of the last one.
:class:`UpdateParts` therefore runs what the divisors depend on for all parts first, and replays the means afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from torch import Tensor


class UpdateParts:
    """The parts of one update that this process runs, one after the other.

    Args:
        count: Number of these parts.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._recorded: list[list[Tensor]] = []
        self._means: list[Tensor] | None = None
        self._replayed = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the divisors of one part inside the block."""
        self._recorded.append([])
        with _inside(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Use the means over all parts inside the block. With several parts, all must have been recorded.

        Raises:
            RuntimeError: If the block does not ask for as many means as were recorded for each part.
        """
        if self.count > 1 and self._means is None:
            self._means = self._average()
        self._replayed = 0
        with _inside(self):
            yield
        if self._means is not None and self._replayed != len(self._means):
            raise RuntimeError(f'{len(self._means)} divisors were recorded, but {self._replayed} are used')

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over all parts in all processes; while recording, the value itself.

        A value must not depend on another mean.
        """
        if self.count == 1:
            return reduce_mean(value)
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
