# SPDX-License-Identifier: Apache-2.0
"""Initial steps and zero points, computed from the values to quantize.

:func:`mean_abs_step` is the rule of LSQ (Esser et al., 2019, section 2.1). :func:`search_step` searches the step, and
the zero point unless it is fixed, with the least squared error. For few values, such as the weights of a channel, the
error of a candidate takes one pass over the values. For many values it takes one binary search per level: the values
are sorted once, and prefix sums of ``x`` give the error of all values that round to level ``v`` as

    sum (x - v)^2 = sum x^2 - 2 v sum x + v^2 count

This is exact and allows thousands of candidates for 10^5 activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Candidate steps, as fractions of the step that clips nothing (first, last, number). They form a geometric sequence
# because the error is a smooth function of log s.
COARSE_RATIOS = (0.02, 1.0, 100)
# Candidates of the second pass, as factors of the best step of the first. They cover slightly more than the distance
# between two candidates of the first pass.
FINE_RATIOS = (0.96, 1.042, 13)
# Zero points of the first pass: all of them up to five bits, evenly spaced ones above.
COARSE_ZERO_POINTS = 33
# The binary search of one level takes about as long as rounding this many values.
LOOKUP_COST = 64
# Levels looked up at once, about 100 bytes each.
CHUNK = 2**20
# Values rounded at once, few enough to stay in the processor's cache.
BLOCK = 2**19


class Grid(NamedTuple):
    """Step and zero point of each row, both fp32 of shape (C,)."""

    step: Tensor
    zero_point: Tensor


def mean_abs_step(mean_abs: Tensor, qmax: int) -> Tensor:
    """Return the initial step of LSQ, ``2 * mean|x| / sqrt(qmax)``.

    Args:
        mean_abs: Mean absolute value of each row, shape (C,).
        qmax: Highest integer.

    Returns:
        Positive steps of shape (C,). A row of zeros gets the mean step of the others, see :func:`fill_dead`.
    """
    return fill_dead(2.0 * mean_abs / qmax**0.5)


def fill_dead(step: Tensor) -> Tensor:
    """Replace the undefined steps of rows of zeros by the mean step of the other rows.

    Args:
        step: Steps, shape (C,); zero or not finite where undefined.

    Returns:
        Positive, finite steps of shape (C,); ones if no row has a step.
    """
    alive = torch.isfinite(step) & (step > torch.finfo(torch.float32).tiny)
    mean = torch.where(alive, step, 0.0).sum() / alive.sum().clamp(min=1)
    return torch.where(alive, step, torch.where(alive.any(), mean, torch.ones_like(mean)))


def search_step(values: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int, zero_points: Sequence[int]) -> Grid:
    """Find the grid with the least squared error for each row.

    Args:
        values: Values, (C, N) fp32, one row per step.
        low: Minimum of each row, shape (C,). If a row is a sample, this may be less than its values.
        high: Maximum of each row, shape (C,); likewise.
        qmin: Lowest integer.
        qmax: Highest integer.
        zero_points: Candidate zero points, ascending, from ``qmin`` to ``qmax``.

    Returns:
        The best step and zero point of each row. Rows of zeros are filled by :func:`fill_dead`.
    """
    sort = values.shape[1] > LOOKUP_COST * (qmax - qmin + 1)
    rows = _SortedRows(values) if sort else _Rows(values)
    spread = min(len(zero_points), COARSE_ZERO_POINTS)
    position = torch.linspace(0, len(zero_points) - 1, spread, device=values.device)
    allowed = torch.tensor(zero_points, device=values.device, dtype=torch.float32)
    zero_point = allowed[position.round().long()]
    ratio = _geometric(COARSE_RATIOS, values.device)
    widest = _widest_step(low[:, None], high[:, None], qmin - zero_point, qmax - zero_point)
    best = rows.best(
        (widest[:, :, None] * ratio).flatten(1),
        zero_point.repeat_interleave(ratio.numel()).expand(len(values), -1),
        qmin,
        qmax,
    )

    gap = -(-len(zero_points) // spread)
    shift = torch.arange(1 - gap, gap, device=values.device, dtype=torch.float32)
    ratio = _geometric(FINE_RATIOS, values.device)
    near = (best.zero_point[:, None] + shift).clamp(zero_points[0], zero_points[-1])
    best = rows.best(
        (best.step[:, None] * ratio).repeat(1, shift.numel()),
        near.repeat_interleave(ratio.numel(), dim=1),
        qmin,
        qmax,
    )
    return Grid(fill_dead(best.step), best.zero_point)


def _geometric(bounds: tuple[float, float, int], device: torch.device) -> Tensor:
    first, last, count = bounds
    return torch.logspace(0, 1, count, base=last / first, device=device) * first


def _widest_step(low: Tensor, high: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Return the least step that clips no value on sides that have levels, (C, Z), from (C, 1) and (Z,)."""
    below = torch.where(lowest < 0, low.clamp(max=0) / lowest, 0.0)
    above = torch.where(highest > 0, high.clamp(min=0) / highest, 0.0)
    return torch.maximum(below, above)


class _Rows:
    """Rows of values, with methods for their squared error on candidate grids."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.float()

    def best(self, step: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Grid:
        """Return the candidate with the least error for each row.

        Args:
            step: (C, K) candidates.
            zero_point: (C, K) candidates.
            qmin: Lowest integer.
            qmax: Highest integer.
        """
        best = self.errors(step, zero_point, qmin, qmax).argmin(dim=1, keepdim=True)
        return Grid(step.gather(1, best).squeeze(1), zero_point.gather(1, best).squeeze(1))

    def errors(self, step: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        """Return the squared error of every candidate, (C, K), up to a constant for each row."""
        height = max(1, BLOCK // self.values.shape[1])
        blocks = zip(self.values.split(height), step.split(height), zero_point.split(height), strict=True)
        return torch.cat([_squared_errors(v, s, z, qmin, qmax) for v, s, z in blocks])


def _squared_errors(values: Tensor, step: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    errors = []
    for s, z in zip(step[..., None].unbind(1), zero_point[..., None].unbind(1), strict=True):
        # A clamp to scalars takes a third of the time of one to tensors.
        levels = (values / s).round_().add_(z).clamp_(qmin, qmax).sub_(z)
        errors.append(levels.mul_(s).sub_(values).square_().sum(dim=1))
    return torch.stack(errors, dim=1)


class _SortedRows(_Rows):
    """Rows of many values, sorted and with prefix sums, so that errors are cheap to compute."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.float().sort(dim=1).values)
        sums = self.values.double().cumsum(dim=1)
        self.sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)

    def errors(self, step: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        """Return the squared errors, (C, K), without the sum of squares of each row."""
        width = max(1, CHUNK // (len(step) * (qmax - qmin + 1)))
        chunks = zip(step.split(width, dim=1), zero_point.split(width, dim=1), strict=True)
        return torch.cat([self._errors(s, z, qmin, qmax) for s, z in chunks], dim=1)

    def _errors(self, step: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        codes = torch.arange(qmin, qmax + 1, device=step.device)
        levels = (codes - zero_point[..., None]) * step[..., None]
        edges = (codes[:-1] + 0.5 - zero_point[..., None]) * step[..., None]
        found = torch.searchsorted(self.values, edges.flatten(1).contiguous())
        sums = self.sums.gather(1, found).view_as(edges)
        counts = found.view_as(edges)
        zero = torch.zeros_like(counts[..., :1])
        counts = torch.diff(counts, prepend=zero, append=zero + self.values.shape[1])
        sums = torch.diff(sums, prepend=zero.double(), append=self.sums[:, -1:, None].expand_as(zero))
        levels = levels.double()
        return (levels * (levels * counts - 2.0 * sums)).sum(dim=-1)
