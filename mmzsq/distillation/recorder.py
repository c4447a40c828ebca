# SPDX-License-Identifier: Apache-2.0
"""Taps on a network: outputs of modules, by module name, without an edit of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmzsq.errors import UserError


def flatten_tensors(output: Any) -> list[Tensor]:
    """All tensors of a nest of tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in flatten_tensors(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in flatten_tensors(value)]
    return []


class Recorder:
    """Collects what named modules return.

    Args:
        model: The network.
        names: Names of its modules.

    Raises:
        UserError: If a name is not a module of ``model``.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self.modules = {}
        for name in names:
            if name not in modules:
                raise UserError(f'{type(model).__name__} has no module {name!r} to record')
            self.modules[name] = modules[name]

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Tensor]]]:
        """Record every forward inside the block.

        Yields:
            Name to tensors that the module returned, flattened, of all its calls in order.
        """
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        for name, module in self.modules.items():
            # Not a hook: MMDetection's detectors call `bbox_head.forward(...)` itself, which no hook hears.
            module.forward = _recording(module.forward, outputs[name])
        try:
            yield outputs
        finally:
            for module in self.modules.values():
                del module.forward


def _recording(forward: Callable[..., Any], outputs: list[Tensor]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs.extend(flatten_tensors(result))
        return result

    return record
