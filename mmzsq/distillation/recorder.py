# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of the modules of a network by name, without changes to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.patching import patched_forwards


def flatten_tensors(output: Any) -> list[Tensor]:
    """Return all tensors of nested tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in flatten_tensors(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in flatten_tensors(value)]
    return []


class Recorder:
    """Records the outputs of named modules. Several recorders may record one module at the same time.

    Args:
        model: The network.
        names: Names of the modules to record.

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
        """Record every forward pass inside the block.

        Yields:
            The tensors that each module returned, flattened, of all its calls in order, by module name.
        """
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.modules}
        # Not a forward hook: MMDetection's detectors call `bbox_head.forward(...)` directly, which runs no hook.
        forwards = {module: _recording(module.forward, outputs[name]) for name, module in self.modules.items()}
        with patched_forwards(forwards):
            yield outputs


def _recording(forward: Callable[..., Any], outputs: list[Tensor]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        outputs.extend(flatten_tensors(result))
        return result

    return record
