# SPDX-License-Identifier: Apache-2.0
"""Units of reconstruction: modules whose output is brought back to that of the float model, one after the other.

Units are found in a run. A unit is the largest module that holds at most :data:`MAX_LAYERS` quantized layers, returns
floating-point tensors, and makes all calls of its layers. That is a residual block or a stage of a small backbone, a
layer of an FPN with its normalization, or a layer of a head. A layer that several modules share is a unit by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmzsq.patching import patched_forwards
from mmzsq.quantization.modules import QuantizedLayer, quantized_layers

MAX_LAYERS = 10
"""Quantized layers in a unit. Larger units follow the few images too closely, and cost memory."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def find_units(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Find the units of a model.

    Args:
        model: A prepared model.
        run: Runs the model on one image.

    Returns:
        Names of modules in the order of their first calls. No unit is inside of another one. Quantized layers that do
        not run are in no unit.
    """
    calls = _Calls(model)
    with torch.no_grad(), patched_forwards({m: calls.recording(m) for m in model.modules() if m is not model}):
        run()
    layers = {layer for _, layer in quantized_layers(model) if calls.total[layer]}
    names = {module: name for name, module in model.named_modules()}
    units: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        inside = [m for m in module.modules() if m in layers]
        if not inside or any(set(inside) <= set(unit.modules()) for unit in units):
            return
        if module is not model and calls.is_unit(module, inside):
            units.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return [names[unit] for unit in sorted(units, key=lambda unit: calls.first[unit])]


class _Calls:
    """Calls of the modules of a model in one run.

    Attributes:
        total: Number of calls of each module.
        first: Position of the first call of each module in the run.
        within: Calls of layers within the calls of each module.
        other_outputs: Modules of which a call returned no tensor, or one that is not of floating point.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total: Counter[nn.Module] = Counter()
        self.first: dict[nn.Module, int] = {}
        self.within: dict[nn.Module, Counter[nn.Module]] = {module: Counter() for module in model.modules()}
        self.other_outputs: set[nn.Module] = set()
        self._running: list[nn.Module] = []

    def recording(self, module: nn.Module) -> Callable[..., Any]:
        """Return a ``forward`` of a module that records its calls."""
        forward = module.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            self.first.setdefault(module, len(self.first))
            self.total[module] += 1
            self._running.append(module)
            if isinstance(module, QuantizedLayer):
                for running in set(self._running):
                    self.within[running][module] += 1
            result = forward(*args, **kwargs)
            self._running.pop()
            tensors = list(tensors_in(result))
            if not tensors or not all(tensor.is_floating_point() for tensor in tensors):
                self.other_outputs.add(module)
            return result

        return record

    def is_unit(self, module: nn.Module, layers: Sequence[nn.Module]) -> bool:
        """Return whether a module can be a unit that holds some layers."""
        return (
            bool(self.total[module])
            and len(layers) <= MAX_LAYERS
            and module not in self.other_outputs
            and all(self.within[module][layer] == self.total[layer] for layer in layers)
        )
