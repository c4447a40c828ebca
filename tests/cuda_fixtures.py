# SPDX-License-Identifier: Apache-2.0
"""Detect operations that a CUDA graph cannot contain, on the CPU or with fake CUDA tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITING = ('local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'aten.equal', 'is_nonzero')


class NoCopies(TorchDispatchMode):
    """Record operators that copy between host and device. Filling a tensor with a number does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kinds = {leaf.device.type for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, torch.Tensor)}
        if kinds == {'cpu', 'cuda'} and func is not torch.ops.aten.fill_.Tensor:
            self.copies.add(str(func))
        return result


class NoValues(TorchDispatchMode):
    """Raise an error for operators that make the host wait for a value or a shape, and record all others.

    Attributes:
        calls: Each operator and the shapes of its results, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = 'aten.index' in name and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_flatten(args[1])[0]
        )
        if masks or any(part in name for part in WAITING):
            raise AssertionError(f'{name} waits for the device')
        result = func(*args, **(kwargs or {}))
        self.calls.append((name, [leaf.shape for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]))
        return result


@pytest.fixture
def no_copies() -> NoCopies:
    """Mode that records copies between host and device."""
    return NoCopies()


@pytest.fixture
def no_values() -> type[NoValues]:
    """Mode that raises an error if the host waits for the device."""
    return NoValues
