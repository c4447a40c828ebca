# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision bit allocation: bits for each layer within a budget of model size or bit operations.

The sensitivities of the layers, that is how much each suffers from fewer bits, are assumed to add up, as in Cai et al.,
"ZeroQ", 2020, https://arxiv.org/abs/2001.00281, and Yao et al., "HAWQ-V3", 2021, https://arxiv.org/abs/2011.10680. To
choose one candidate per layer with the least total sensitivity and a bounded total cost is a multiple-choice knapsack
problem, which :func:`allocate` solves as an integer program. This module takes the sensitivities as given;
:mod:`mmzsq.qat.sensitivity` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from mmzsq.errors import UserError
from mmzsq.module_patterns import enclosing_names
from mmzsq.quantization.config import Bits, QuantizationConfig
from mmzsq.quantization.modules import quantized_layers
from mmzsq.quantization.prepare import set_bits
from mmzsq.quantization.quantizers import check_bits
from mmzsq.quantization.report import MEGABYTE, LayerReport, QuantizationReport

OBJECTIVE_SCALE = 1e5
"""Largest coefficient of the integer program's objective. The solver stops at an absolute gap of 1e-6."""


def allocate(sensitivity: Any, cost: Any, budget: float) -> list[int]:
    """Choose one candidate per layer: the least total sensitivity whose total cost is within the budget.

    Equal arguments give equal choices. Of the candidates of one layer that are equally sensitive, the cheapest is
    chosen.

    Args:
        sensitivity: Sensitivity of each layer for each candidate, (L, C), in any unit; finite.
        cost: Cost of the same, (L, C), not negative. Whole numbers below 2^53 are added up without rounding.
        budget: Upper bound of the total cost, in the unit of ``cost``.

    Returns:
        Index of the chosen candidate of each layer, L numbers. The total cost never exceeds the budget. The total
        sensitivity is the least possible up to the solver's tolerances: 1e-11 of the largest difference in sensitivity
        between two candidates of a layer, and 1e-6 of the largest difference in cost.

    Raises:
        UserError: If even the cheapest candidates cost more than the budget, or a number is not finite.

    Example:
        >>> allocate([[9, 1], [5, 4]], [[2, 4], [2, 4]], budget=6)
        [1, 0]
    """
    values, costs = (np.asarray(numbers, dtype=float) for numbers in (sensitivity, cost))
    if values.shape != costs.shape or values.ndim != 2 or not values.size:
        raise ValueError(f'sensitivity and cost must both be (L, C), but are {values.shape} and {costs.shape}')
    if not (np.isfinite(values).all() and np.isfinite(costs).all()):
        raise UserError('a sensitivity or cost is not finite: leave that candidate out')
    least = costs.min(1).sum()
    if least > budget:
        raise UserError(
            f'the budget is {budget:,.10g}, but even the cheapest candidates cost {least:,.10g}: raise the budget to '
            'that at least, or add cheaper candidates'
        )
    rows = np.arange(len(values))
    limit = budget - least
    while True:
        chosen = _solve(values - values.min(1, keepdims=True), costs - costs.min(1, keepdims=True), limit)
        excess = costs[rows, chosen].sum() - budget
        if excess <= 0:
            return [int(index) for index in chosen]
        # The solver accepts a constraint that is violated by 1e-6.
        limit = max(limit - excess, 0.0)


def _solve(values: np.ndarray, costs: np.ndarray, limit: float) -> np.ndarray:
    """Solve the integer program: one binary variable for each layer and candidate, (L, C), one per layer set.

    Args:
        values: What to minimize, (L, C), with a zero in each row.
        costs: Costs, (L, C), with a zero in each row.
        limit: Upper bound of the total cost; not negative.

    Returns:
        Index of the chosen candidate of each layer, (L,).
    """
    num_layers, num_candidates = values.shape
    allowed = (costs <= limit) & ~_is_dominated(values, costs)
    largest_value = np.max(values, where=allowed, initial=0.0) or 1.0
    largest_cost = np.max(costs, where=allowed, initial=0.0) or 1.0
    one_per_layer = sparse.kron(sparse.identity(num_layers), np.ones((1, num_candidates)))
    total_cost = np.where(allowed, costs, 0.0).reshape(1, -1) / largest_cost
    solution = milp(
        np.where(allowed, values, 0.0).ravel() * (OBJECTIVE_SCALE / largest_value),
        integrality=np.ones(values.size),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[LinearConstraint(one_per_layer, 1, 1), LinearConstraint(total_cost, ub=limit / largest_cost)],
        # Presolve makes the solver accept larger violations of the cost constraint.
        options=dict(mip_rel_gap=0.0, presolve=False),
    )
    if solution.x is None:
        raise RuntimeError(f'no allocation of bits was found: {solution.message}')
    chosen: np.ndarray = solution.x.reshape(values.shape).argmax(1)
    return chosen


def _is_dominated(values: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Mark candidates that another of the same layer beats in value or cost, and equals or beats in both; (L, C)."""
    value, other_value = values[:, :, None], values[:, None, :]
    cost, other_cost = costs[:, :, None], costs[:, None, :]
    index = np.arange(values.shape[1])
    no_worse = (other_value <= value) & (other_cost <= cost)
    preferred = (other_value < value) | (other_cost < cost) | (index[None, :] < index[:, None])
    return np.asarray((no_worse & preferred).any(2))


def allocatable(report: QuantizationReport) -> list[LayerReport]:
    """Return the layers that bits can be allocated to.

    These are quantized, have a weight, and neither their role nor a pattern decides their bits.

    Args:
        report: Report of the prepared model.

    Returns:
        The layers, in the order of the report.

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
    """Budget of a model, and the cost of each layer with each candidate number of bits.

    Created by :meth:`from_size`, :meth:`from_bit_operations`, :meth:`from_average_bits` or :meth:`from_config`.

    Attributes:
        name: Name of the bounded quantity, for messages.
        unit: Its unit, for messages.
        scale: Costs in one unit: bits, or bit operations.
        limit: Upper bound of the quantity, in its unit.
        fixed: Costs that the allocation cannot change.
        costs: Cost of each layer with each candidate, (L, C) whole numbers as fp64: bits, or bit operations.
        candidates: Candidate numbers of bits, C of them.
        inputs: Whether a candidate also sets the bits of the layer's input. If not, inputs keep their bits.
        layers: The layers to allocate bits to, L of them.
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
        """Bound the size of the whole model, as ``report.size_after`` counts it.

        Args:
            report: Report of the prepared model.
            candidates: Bits to choose from, for weights; inputs keep their bits.
            megabytes: Upper bound of the size, in MB (10^6 bytes).

        Raises:
            UserError: If no layer is free to get bits.
        """
        layers = allocatable(report)
        kept = round(report.size_after * 8 * MEGABYTE) - sum(layer.weights * layer.w_bits for layer in layers)
        costs = _weight_bits(layers, candidates)
        return cls('model size', 'MB', 8 * MEGABYTE, megabytes, kept, costs, candidates, False, layers)

    @classmethod
    def from_average_bits(cls, report: QuantizationReport, candidates: Sequence[int], bits: float) -> Budget:
        """Bound the average number of bits of the weights to allocate bits to.

        Args:
            report: Report of the prepared model.
            candidates: Bits to choose from, for weights; inputs keep their bits.
            bits: Upper bound of the average over all of these weights, 4.5 for example.

        Raises:
            UserError: If no layer is free to get bits.
        """
        layers = allocatable(report)
        weights = sum(layer.weights for layer in layers)
        costs = _weight_bits(layers, candidates)
        return cls('average of weights', 'bits', weights, bits, 0, costs, candidates, False, layers)

    @classmethod
    def from_bit_operations(cls, report: QuantizationReport, candidates: Sequence[int], giga: float) -> Budget:
        """Bound the bit operations of the whole model, as ``report.bops_after`` counts them.

        Args:
            report: Report of the prepared model.
            candidates: Bits to choose from; a layer's weight and input both get them.
            giga: Upper bound, in 10^9 bit operations.

        Raises:
            UserError: If no layer is free to get bits, or the report counts no operations.
        """
        layers = allocatable(report)
        if report.bops_after is None:
            raise UserError('bit operations are not known: pass `run` to `prepare`')
        macs = np.array([layer.macs or 0 for layer in layers], dtype=float)
        kept = report.bops_after - sum((layer.macs or 0) * layer.w_bits * layer.a_bits for layer in layers)
        costs = np.outer(macs, np.square(candidates))
        return cls(report.bops_name, 'G', 1e9, giga, kept, costs, candidates, True, layers)

    @classmethod
    def from_config(cls, report: QuantizationReport, config: QuantizationConfig) -> Budget:
        """Create the budget of ``config.allocate``: the cost of ``w_bits`` and ``a_bits`` in every layer.

        Args:
            report: Report of a model prepared with ``config``.
            config: Its ``allocate`` must not be ``None``.

        Raises:
            UserError: If no layer is free to get bits, or the report lacks the operations to bound.
        """
        settings = config.allocate
        assert settings is not None
        candidates = sorted(set(settings.candidates))
        if settings.budget == 'size':
            return cls.from_average_bits(report, candidates, config.w_bits)
        # Half an operation more than now: the division and multiplication by 1e9 may round.
        return cls.from_bit_operations(report, candidates, ((report.bops_after or 0) + 0.5) / 1e9)

    def allocate(self, sensitivity: Any) -> list[Bits]:
        """Allocate bits to the layers, see :func:`allocate`.

        Args:
            sensitivity: Sensitivity of each layer for each candidate, (L, C).

        Returns:
            Bits of weight and input of each layer, L of them.

        Raises:
            UserError: See :meth:`check`.
        """
        self.check()
        chosen = allocate(sensitivity, self.costs, self.limit * self.scale - self.fixed)
        return [self.bits_of(layer, self.candidates[index]) for layer, index in zip(self.layers, chosen, strict=True)]

    def check(self) -> None:
        """Check that the candidates are valid and that the fewest bits keep the budget.

        Raises:
            UserError: If a candidate is not an integer from 2 to 8, or the budget is too small. The message then names
                the smallest possible budget.
        """
        for bits in self.candidates:
            check_bits('a candidate', bits)
        least = self.fixed + self.costs.min(1).sum()
        if least > self.limit * self.scale:
            # Rounded up, so that a budget as shown is possible.
            shown = np.ceil(least / self.scale * 1e4 - 1e-9) / 1e4
            raise UserError(
                f'the budget is {self.limit:g} {self.unit} ({self.name}), but the least possible is {shown:.4f} '
                f'{self.unit}, with {min(self.candidates)} bits in each of {len(self.layers)} layers: raise the '
                'budget, or add candidates of fewer bits'
            )

    def bits_of(self, layer: LayerReport, candidate: int) -> Bits:
        """Return the bits of weight and input of ``layer`` with a candidate."""
        return Bits(candidate, candidate if self.inputs else layer.a_bits)

    def uniform(self) -> int:
        """Return the largest candidate that keeps the budget when all layers have it.

        Raises:
            UserError: See :meth:`check`.
        """
        self.check()
        spent = self.fixed + self.costs.sum(0)
        return max(bits for bits, total in zip(self.candidates, spent, strict=True) if total <= self.limit * self.scale)


def _weight_bits(layers: Sequence[LayerReport], candidates: Sequence[int]) -> np.ndarray:
    return np.outer([float(layer.weights) for layer in layers], candidates)


def overrides_for(report: QuantizationReport, bits: Mapping[str, Bits]) -> dict[str, Bits | None]:
    """Return ``zsq.quantizer.overrides`` that give these bits to these layers and leave all other layers unchanged.

    A layer's name as a pattern also selects the layers inside it, such as the convolution that computes the offsets of
    a deformable one. If such a layer is not in ``bits``, a later override restores its present bits.

    Args:
        report: Report of the model without these overrides.
        bits: New bits by layer name.

    Returns:
        Layer name to bits, ``None`` for float. The order matters: the last pattern that matches wins.
    """
    overrides: dict[str, Bits | None] = dict(bits)
    for layer in report.layers:
        inside = any(name in bits for name in enclosing_names(layer.name))
        if inside and layer.name not in bits and layer.type != 'Parameter':
            overrides[layer.name] = Bits(layer.w_bits, layer.a_bits) if layer.quantized else None
    return overrides


def overrides_to_dict(overrides: Mapping[str, Bits | None]) -> dict[str, dict[str, int] | None]:
    """Return ``zsq.quantizer.overrides`` as plain data, for configs and checkpoints."""
    return {name: None if bits is None else bits._asdict() for name, bits in overrides.items()}


def assign_bits(report: QuantizationReport, config: QuantizationConfig, bits: Mapping[str, Bits]) -> None:
    """Replace the quantizers of some layers of a prepared model, as if ``config.overrides`` had set their bits.

    The new quantizers are not initialized. The report is updated.

    Args:
        report: Report of the prepared model.
        config: Settings of the new quantizers.
        bits: New bits by the name of a quantized layer.
    """
    modules = dict(quantized_layers(report.model))
    for index, layer in enumerate(report.layers):
        if layer.name in bits:
            new = bits[layer.name]
            set_bits(modules[layer.name], config, new)
            reason = f'overrides {layer.name!r}'
            report.layers[index] = replace(layer, w_bits=new.w_bits, a_bits=new.a_bits, reason=reason)


def size_and_operations(report: QuantizationReport, bits: Mapping[str, Bits]) -> tuple[float, float]:
    """Compute the size and bit operations of a model with other bits in some layers.

    Args:
        report: Report of the model as it is.
        bits: Other bits by layer name.

    Returns:
        Size in MB (10^6 bytes), and 10^9 bit operations of the run that the report counts, 0 if it counts none.
    """
    size, operations = report.size_after, float(report.bops_after or 0)
    for layer in report.layers:
        if layer.name in bits:
            w_bits, a_bits = bits[layer.name]
            size += layer.weights * (w_bits - layer.w_bits) / 8 / MEGABYTE
            operations += (layer.macs or 0) * (w_bits * a_bits - layer.w_bits * layer.a_bits)
    return size, operations / 1e9
