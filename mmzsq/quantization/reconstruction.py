# SPDX-License-Identifier: Apache-2.0
"""Reconstruct a unit of a quantized model: learn roundings and steps that bring its output back to that of float.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021,
https://arxiv.org/abs/2102.05426, with the learned rounding of :mod:`mmzsq.quantization.adaptive_rounding`.

No label and no loss of the detector is read. The integers of a weight move by at most one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmzsq.patching import patched_forwards
from mmzsq.quantization.adaptive_rounding import AdaptiveRounding
from mmzsq.quantization.calibrate import quantizers
from mmzsq.quantization.modules import quantized_layers
from mmzsq.quantization.quantizers import LSQ
from mmzsq.quantization.units import tensors_in

ROUNDING_LR = 3e-2
"""Learning rate of the variables of roundings."""
STEP_LR = 4e-3
"""Learning rate of the logarithms of steps of activations."""
ELEMENTS = 2**17
"""Values of outputs that one iteration compares, in up to :data:`MAX_CALLS` calls. Small maps need more images."""
MAX_CALLS = 8
PENALTY = 50.0
"""Weight of the regularizer of roundings, relative to the error of the unit before."""
EXPONENTS = (10.0, 2.0)
"""Exponents of the regularizer at its start and its end."""
FREE = 0.2
"""Part of the iterations without the regularizer."""


@dataclass
class Call:
    """One call of a unit.

    Attributes:
        args: Positional and keyword arguments in the quantized model.
        targets: Tensors that the unit returned in the float model.
        modes: Whether each module of the unit was in train mode.
    """

    args: tuple[tuple[Any, ...], dict[str, Any]]
    targets: list[Tensor]
    modes: dict[nn.Module, bool]

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in tensors_in([self.args, self.targets]))


class Errors(NamedTuple):
    """Squared error of the output of a unit, relative to the variance of the float output.

    Attributes:
        before: With the initial steps and the nearest rounding.
        after: With what was kept: the learned values, or the initial ones if these are better.
    """

    before: float
    after: float


@contextmanager
def recording_calls(unit: nn.Module, float_unit: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of a unit and those of its float original inside the block.

    Args:
        unit: The unit in the quantized model.
        float_unit: The same module in the float model.

    Yields:
        A list that is filled when the block ends: the calls of both, paired in their order.
    """
    calls: list[Call] = []
    seen: list[tuple[Any, ...]] = []
    float_seen: list[tuple[Any, ...]] = []
    forwards = {
        unit: _recording(unit, seen),
        float_unit: _recording(float_unit, float_seen),
    }
    with patched_forwards(forwards):
        yield calls
    for (args, _, modes), (_, targets, _) in zip(seen, float_seen, strict=True):
        calls.append(Call(args, targets, modes))


def _recording(module: nn.Module, seen: list[tuple[Any, ...]]) -> Callable[..., Any]:
    forward = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        # Copies, because operations in place may change arguments and results later.
        given = _copied((args, kwargs))
        modes = {part: part.training for part in module.modules()}
        result = forward(*args, **kwargs)
        seen.append((given, [tensor.detach().clone() for tensor in tensors_in(result)], modes))
        return result

    return record


def _copied(value: Any) -> Any:
    """Return nested tuples, lists and dicts with copies of all tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, '_fields'):
        return type(value)(*(_copied(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


class Reconstruction:
    """Learns the roundings of the weights of one unit, and the steps of its activations.

    Args:
        unit: Module with initialized quantizers.
        calls: Recorded calls, at least one.
        fixed: Quantizers whose steps stay, since another unit has learned them.
        generator: Random generator of the order of calls, on the CPU.
    """

    def __init__(
        self,
        unit: nn.Module,
        calls: Sequence[Call],
        fixed: set[LSQ],
        generator: torch.Generator,
    ) -> None:
        self.unit, self.calls, self.generator = unit, calls, generator
        self.layers = [layer for _, layer in quantized_layers(unit) if layer.can_set_filters]
        self.roundings = [AdaptiveRounding(layer.weight_quantizer, layer.filters()) for layer in self.layers]
        weight_quantizers = {layer.weight_quantizer for _, layer in quantized_layers(unit)}
        self.activations = [q for _, q in quantizers(unit) if q not in weight_quantizers | fixed]
        count = len(calls[0].targets)
        elements = sum(tensor.numel() for call in calls for tensor in call.targets) / len(calls)
        self.width = min(max(round(ELEMENTS / elements), 1), MAX_CALLS)
        self.scales = [
            1 / max(sum(float(call.targets[i].float().var(correction=0)) for call in calls) / len(calls), 1e-12)
            for i in range(count)
        ]

    def run(self, iterations: int) -> Errors:
        """Learn, and keep the result if it is better than the initial state on the recorded calls.

        Args:
            iterations: Number of updates.

        Returns:
            The errors before and after.
        """
        before = self.error()
        saved = {name: value.clone() for name, value in self.unit.state_dict().items()}
        self._learn(iterations, max(before, 1e-12))
        with torch.no_grad():
            for layer, rounding in zip(self.layers, self.roundings, strict=True):
                layer.set_filters(rounding.rounded())
        after = self.error()
        if not after < before:
            self.unit.load_state_dict(saved)
            after = before
        return Errors(before, after)

    @torch.no_grad()
    def error(self) -> float:
        """Return the error of the unit as it is, averaged over all calls."""
        return sum(float(self._distance(call)) for call in self.calls) / len(self.calls)

    def _distance(self, call: Call) -> Tensor:
        for module, training in call.modes.items():
            module.training = training
        positional, named = _copied(call.args)
        outputs = list(tensors_in(self.unit(*positional, **named)))
        terms = [
            (output.float() - target.float()).square().mean() * scale
            for output, target, scale in zip(outputs, call.targets, self.scales, strict=True)
        ]
        return torch.stack(terms).mean()

    def _learn(self, iterations: int, unit_error: float) -> None:
        groups = [dict(params=[r.variable], lr=ROUNDING_LR, decays=False) for r in self.roundings]
        for quantizer in self.activations:
            for name, parameter in quantizer.named_parameters():
                if name.endswith('step'):
                    lr = STEP_LR * (1.0 if name == 'log_step' else float(parameter))
                    groups.append(dict(params=[parameter], lr=lr, decays=True))
        if not groups:
            return
        optimizer = torch.optim.Adam(groups)
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        rates = [group['lr'] for group in optimizer.param_groups]
        weights = {layer.weight_quantizer: r for layer, r in zip(self.layers, self.roundings, strict=True)}
        sizes = sum(rounding.variable.numel() for rounding in self.roundings)
        with torch.enable_grad(), patched_forwards({q: rounding.forward for q, rounding in weights.items()}):
            for iteration in range(iterations):
                progress = iteration / iterations
                chosen = torch.randint(len(self.calls), (self.width,), generator=self.generator).tolist()
                distances = [self._distance(self.calls[i]) for i in chosen]
                loss = torch.stack(distances).mean() / unit_error
                if progress >= FREE:
                    annealed = (progress - FREE) / (1 - FREE)
                    exponent = EXPONENTS[1] + (EXPONENTS[0] - EXPONENTS[1]) * (1 - annealed)
                    for rounding in self.roundings:
                        share = rounding.variable.numel() / sizes
                        loss = loss + PENALTY * share * rounding.penalty(exponent)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    if group['decays']:
                        group['lr'] = rate * (1 + math.cos(math.pi * progress)) / 2
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
