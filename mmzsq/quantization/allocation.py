# SPDX-License-Identifier: Apache-2.0
"""Bits for each layer under a budget of model size or bit operations, by how much each layer suffers from fewer bits.

The sensitivities of layers are taken to add up, as in Cai et al., "ZeroQ", 2020, https://arxiv.org/abs/2001.00281, and
Yao et al., "HAWQ-V3", 2021, https://arxiv.org/abs/2011.10680. One candidate a layer, the least sum, a bounded cost: a
multiple-choice knapsack, solved here exactly. Where sensitivities come from is no matter of this module;
:mod:`mmzsq.qat.sensitivity` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmzsq.errors import UserError
from mmzsq.module_patterns import enclosing_names
from mmzsq.quantization.config import Bits, QuantizationConfig
from mmzsq.quantization.modules import quantized_layers
from mmzsq.quantization.prepare import set_bits
from mmzsq.quantization.quantizers import check_bits
from mmzsq.quantization.report import MEGABYTE, LayerReport, QuantizationReport

BISECTIONS = 100


def allocate(sensitivity: Any, cost: Any, budget: float) -> list[int]:
    """Choose one candidate a layer, so that the summed sensitivity is least and the summed cost within the budget.

    Layers are taken one by one. Of the choices so far those are kept that no other beats in both sums, that leave
    enough for the rest, and whose Lagrangian bound does not exceed the best choice known.

    Args:
        sensitivity: Of each layer with each candidate, (L, C), in any unit; finite.
        cost: Of the same, (L, C), not negative. Whole numbers below 2^53 are added up without rounding.
        budget: Most that the chosen candidates may cost in all, in the unit of ``cost``.

    Returns:
        Index of the candidate of each layer, L numbers.

    Raises:
        UserError: If even the cheapest candidates cost more, or a number is not finite.

    Example:
        >>> allocate([[9, 1], [5, 4]], [[2, 4], [2, 4]], budget=6)
        [1, 0]
    """
    values, costs = (np.asarray(numbers, dtype=float) for numbers in (sensitivity, cost))
    if values.shape != costs.shape or values.ndim != 2 or not values.size:
        raise ValueError(f'sensitivity and cost are both (L, C), not {values.shape} and {costs.shape}')
    if not (np.isfinite(values).all() and np.isfinite(costs).all()):
        raise UserError('a sensitivity or cost is not finite: leave that candidate out')
    least = costs.min(1).sum()
    if least > budget:
        raise UserError(
            f'the budget is {budget:,.10g}, but even the cheapest candidates cost {least:,.10g}: raise the budget to '
            'that at least, or add cheaper candidates'
        )
    rows = np.arange(len(values))
    multiplier, known = _relax(values, costs, budget)
    # What the layers from each on cost at least, and add to the bound at least.
    cost_of_rest = np.append(np.cumsum(costs.min(1)[::-1])[::-1], 0)
    bound_of_rest = np.append(np.cumsum((values + multiplier * costs).min(1)[::-1])[::-1], 0)
    rounding = 1e-9 * (np.abs(values).sum() + multiplier * budget)
    highest = values[rows, known].sum() + multiplier * budget + rounding
    value, spent = np.zeros(1), np.zeros(1)
    steps = []
    for row in rows:
        value, spent = (np.add.outer(*pair).ravel() for pair in ((value, values[row]), (spent, costs[row])))
        fits = spent + cost_of_rest[row + 1] <= budget
        fits &= value + multiplier * spent + bound_of_rest[row + 1] <= highest
        order = np.flatnonzero(fits)
        order = order[np.lexsort((value[order], spent[order]))]
        best_before = np.minimum.accumulate(np.append(np.inf, value[order]))[:-1]
        order = order[value[order] < best_before]
        value, spent = value[order], spent[order]
        steps.append(np.divmod(order, values.shape[1]))
    state, chosen = int(value.argmin()), []
    for parents, candidates in reversed(steps):
        chosen.append(int(candidates[state]))
        state = parents[state]
    return chosen[::-1]


def _relax(values: np.ndarray, costs: np.ndarray, budget: float) -> tuple[float, np.ndarray]:
    """The price of a unit of cost at which the budget is nearly spent, and what is chosen at that price, (L,)."""

    def choose(price: float) -> np.ndarray:
        priced = values + price * costs
        # Of equals the cheapest.
        return np.where(priced == priced.min(1, keepdims=True), costs, np.inf).argmin(1)

    def fits(price: float) -> bool:
        return costs[np.arange(len(costs)), choose(price)].sum() <= budget

    if fits(0.0):
        return 0.0, choose(0.0)
    low, high = 0.0, max(np.ptp(values), np.finfo(float).tiny) / costs.max()
    while not fits(high):
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high, choose(high)


def allocatable(report: QuantizationReport) -> list[LayerReport]:
    """Layers whose bits are free: quantized, with a weight, and with no bits of their own by role or by a pattern.

    Raises:
        UserError: If there is none.
    """
    layers = [layer for layer in report.layers if layer.quantized and layer.weights and not layer.reason]
    if not layers:
        raise UserError(
            'there is no layer to allocate bits to: every layer is float, first, last, or has bits of its own in '
            'zsq.quantizer.overrides'
        )
    return layers


@dataclass(frozen=True)
class Budget:
    """What the layers may cost, and what each costs with each number of bits.

    Made by :meth:`from_size`, :meth:`from_bit_operations` or :meth:`from_average_bits`.

    Attributes:
        name: Of the quantity, for messages.
        unit: Its unit, for messages.
        scale: Costs in one unit: bits, or bit operations.
        limit: Of the quantity, in its unit.
        fixed: What cannot be changed, in costs.
        costs: Of each layer with each candidate, (L, C) whole numbers as fp64: bits, or bit operations.
        candidates: Bits, C numbers.
        inputs: Whether the bits are those of inputs too; else inputs keep theirs.
        layers: The layers, L.
    """

    name: str
    unit: str
    scale: float
    limit: float
    fixed: float
    costs: np.ndarray
    candidates: Sequence[int]
    inputs: bool
    layers: Sequence[LayerReport]

    @classmethod
    def from_size(cls, report: QuantizationReport, candidates: Sequence[int], megabytes: float) -> Budget:
        """Bound the size of the whole model, as ``report.size_after`` counts it, in MB (10^6 bytes)."""
        layers = allocatable(report)
        kept = round(report.size_after * 8 * MEGABYTE) - sum(layer.weights * layer.w_bits for layer in layers)
        costs = _weight_bits(layers, candidates)
        return cls('model size', 'MB', 8 * MEGABYTE, megabytes, kept, costs, candidates, False, layers)

    @classmethod
    def from_average_bits(cls, report: QuantizationReport, candidates: Sequence[int], bits: float) -> Budget:
        """Bound the size of the weights in question by what it is with this many bits each, 4.5 for example."""
        layers = allocatable(report)
        weights = sum(layer.weights for layer in layers)
        costs = _weight_bits(layers, candidates)
        return cls('average of weights', 'bits', weights, bits, 0, costs, candidates, False, layers)

    @classmethod
    def from_bit_operations(cls, report: QuantizationReport, candidates: Sequence[int], giga: float) -> Budget:
        """Bound the bit operations of the whole model, as ``report.bops_after`` counts them, in 10^9.

        Raises:
            UserError: If the report counts none.
        """
        layers = allocatable(report)
        if report.bops_after is None:
            raise UserError('bit operations are not known: pass `run` to `prepare`')
        macs = np.array([layer.macs or 0 for layer in layers], dtype=float)
        kept = report.bops_after - sum((layer.macs or 0) * layer.w_bits * layer.a_bits for layer in layers)
        costs = np.outer(macs, np.square(candidates))
        return cls('bit operations', 'G', 1e9, giga, kept, costs, candidates, True, layers)

    @classmethod
    def from_config(cls, report: QuantizationReport, config: QuantizationConfig) -> Budget:
        """What ``config.allocate`` says of the model that ``report`` is of."""
        settings = config.allocate
        assert settings is not None
        candidates = sorted(set(settings.candidates))
        if settings.budget == 'size':
            return cls.from_average_bits(report, candidates, config.w_bits)
        # As many as now, whatever rounding does to them.
        return cls.from_bit_operations(report, candidates, ((report.bops_after or 0) + 0.5) / 1e9)

    def allocate(self, sensitivity: Any) -> list[Bits]:
        """Bits of each layer, see :func:`allocate`.

        Args:
            sensitivity: (L, C).

        Raises:
            UserError: See :meth:`check`.
        """
        self.check()
        chosen = allocate(sensitivity, self.costs, self.limit * self.scale - self.fixed)
        return [self.bits_of(layer, self.candidates[index]) for layer, index in zip(self.layers, chosen, strict=True)]

    def check(self) -> None:
        """Refuse candidates that are no bits, and a budget that not even the fewest bits keep.

        Raises:
            UserError: Says the least that is possible.
        """
        for bits in self.candidates:
            check_bits('a candidate', bits)
        least = self.fixed + self.costs.min(1).sum()
        if least > self.limit * self.scale:
            # Rounded up, so that what is said is possible.
            shown = np.ceil(least / self.scale * 1e4 - 1e-9) / 1e4
            raise UserError(
                f'the budget is {self.limit:g} {self.unit} ({self.name}), but the least possible is {shown:.4f} '
                f'{self.unit}, with {min(self.candidates)} bits in each of {len(self.layers)} layers: raise the '
                'budget, or add candidates of fewer bits'
            )

    def bits_of(self, layer: LayerReport, candidate: int) -> Bits:
        """Bits of weight and input of ``layer`` with a candidate."""
        return Bits(candidate, candidate if self.inputs else layer.a_bits)

    def uniform(self) -> int:
        """The most bits, of the candidates, that all layers may have alike.

        Raises:
            UserError: See :meth:`check`.
        """
        self.check()
        spent = self.fixed + self.costs.sum(0)
        return max(bits for bits, total in zip(self.candidates, spent, strict=True) if total <= self.limit * self.scale)


def _weight_bits(layers: Sequence[LayerReport], candidates: Sequence[int]) -> np.ndarray:
    return np.outer([float(layer.weights) for layer in layers], candidates)


def overrides_of(report: QuantizationReport, bits: Mapping[str, Bits]) -> dict[str, Bits | None]:
    """The setting ``zsq.quantizer.overrides`` that gives these bits to these layers and changes no other.

    A pattern also matches what is in a layer, as the convolution of offsets in a deformable one: where that has bits of
    another reason, it is told again, behind it.

    Args:
        report: Of the model without these overrides.
        bits: By the name of the layer.

    Returns:
        Name of a layer to its bits, None for float, in the order in which they have to stand.
    """
    overrides: dict[str, Bits | None] = dict(bits)
    for layer in report.layers:
        inside = any(name in bits for name in enclosing_names(layer.name))
        if inside and layer.name not in bits and layer.type != 'Parameter':
            overrides[layer.name] = Bits(layer.w_bits, layer.a_bits) if layer.quantized else None
    return overrides


def as_settings(overrides: Mapping[str, Bits | None]) -> dict[str, dict[str, int] | None]:
    """``zsq.quantizer.overrides`` as plain data, which a config and a checkpoint hold."""
    return {name: None if bits is None else bits._asdict() for name, bits in overrides.items()}


def assign_bits(report: QuantizationReport, config: QuantizationConfig, bits: Mapping[str, Bits]) -> None:
    """Give layers of a prepared model other bits, as if ``config.overrides`` had named them; their steps begin anew.

    Args:
        report: Of the model; it then tells of the new bits.
        config: What new quantizers are made by.
        bits: By the name of a quantized layer.
    """
    modules = dict(quantized_layers(report.model))
    for index, layer in enumerate(report.layers):
        if layer.name in bits:
            of = bits[layer.name]
            set_bits(modules[layer.name], config, of)
            reason = f'overrides {layer.name!r}'
            report.layers[index] = replace(layer, w_bits=of.w_bits, a_bits=of.a_bits, reason=reason)


def totals(report: QuantizationReport, bits: Mapping[str, Bits]) -> tuple[float, float]:
    """Size and bit operations of a model, were the bits of some layers others.

    Args:
        report: Of the model as it is.
        bits: By the name of the layer.

    Returns:
        MB (10^6 bytes), and 10^9 bit operations in the run that the report counts, 0 if it counts none.
    """
    size, operations = report.size_after, float(report.bops_after or 0)
    for layer in report.layers:
        if layer.name in bits:
            w_bits, a_bits = bits[layer.name]
            size += layer.weights * (w_bits - layer.w_bits) / 8 / MEGABYTE
            operations += (layer.macs or 0) * (w_bits * a_bits - layer.w_bits * layer.a_bits)
    return size, operations / 1e9
