# SPDX-License-Identifier: Apache-2.0
"""Find the first and last layers of a model and count operations, from one run.

The model runs once with autograd enabled, and the recorded graph is searched backwards. A layer is *last* if a path
from the outputs reaches it before any other layer, or if no other layer reads its output. The second rule covers the
proposals of two-stage detectors, which are detached from the graph. A layer is *first* if its inputs depend on no other
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from mmzsq.errors import UserError
from mmzsq.quantization.attention import QuantMatmul
from mmzsq.quantization.modules import weight_of


@dataclass
class Trace:
    """Result of one run.

    Attributes:
        first: Names of layers with no other layer before them.
        last: Names of layers with no other layer between them and the outputs, or whose output no other layer reads.
        macs: Multiply-accumulate operations by layer name, summed over the run. Layers that did not run are missing.
    """

    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    macs: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> Trace:
    """Run the model once, in eval mode, to find its first and last layers and to count operations.

    Args:
        model: The model. Its train or eval modes and ``requires_grad`` flags are restored, and no gradient is kept.
        layers: Convolutions, linear layers and products of activations by name.
        run: Runs the model on some input and returns its raw outputs: tensors, nested in tuples, lists, dicts and
            objects with ``__dict__``. Decoded predictions after NMS are unsuitable, as they may be detached from the
            graph.

    Returns:
        First and last layers, and operations of all layers.

    Raises:
        UserError: If no output depends on a layer.
    """
    result = Trace()
    made_by: dict[Node, str] = {}
    causes: list[tuple[str, list[Node | None]]] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            sources = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            result.macs[name] = result.macs.get(name, 0) + _macs(layer, sources[0], output)
            if output.grad_fn is not None:
                # An in-place operation on a view continues from its base, as after a linear layer on 3-D inputs.
                own = {output.grad_fn, output._base.grad_fn} if output._is_view() else {output.grad_fn}
                made_by.update(dict.fromkeys(own, name))
                # Not the inputs: a layer may contain another, as a deformable convolution that of its offsets.
                causes.append((name, [n for node in own for n, _ in node.next_functions if n not in own]))

        return hook

    with ExitStack() as undo:
        undo.enter_context(_differentiable_eval(model, layers.values()))
        for name, layer in layers.items():
            undo.callback(layer.register_forward_hook(record(name), with_kwargs=True).remove)
        outputs = run()

    roots = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    result.last = set(_nearest(roots, made_by))
    if not result.last:
        raise UserError(
            'No first and last layers were found: `run` returned nothing that depends on a '
            'convolution or linear layer through autograd. Return the raw outputs of the heads (in '
            'MMDetection `mode="tensor"`), not predictions.'
        )
    read: set[str] = set()
    for name, nodes in causes:
        before = set(_nearest(nodes, made_by))
        read |= before
        if not before:
            result.first.add(name)
    result.last |= set(made_by.values()) - read
    return result


def _macs(layer: nn.Module, source: Tensor, output: Tensor) -> int:
    """Count the multiply-accumulates of one call: one filter, or one row of the left operand, per output value."""
    if isinstance(layer, QuantMatmul):
        return output.numel() * source.shape[-1]
    values = source if getattr(layer, 'transposed', False) else output
    return values.numel() * weight_of(layer)[0].numel()


@contextmanager
def _differentiable_eval(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the model is in eval mode and the parameters of ``layers`` require gradients."""
    training = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    model.eval()
    try:
        for parameter in required:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in required.items():
            parameter.requires_grad_(before)
        for module, before in training.items():
            module.training = before


def _tensors(nest: Any, within: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Yield all tensors of a nested object; ``within`` holds the ids of the enclosing objects, to stop at cycles."""
    if isinstance(nest, Tensor):
        yield nest
        return
    if id(nest) in within:
        return
    children: Iterable[Any] = ()
    if isinstance(nest, Mapping):
        children = nest.values()
    elif isinstance(nest, (tuple, list, set)):
        children = nest
    elif hasattr(nest, '__dict__') and not isinstance(nest, (type, nn.Module)):
        children = vars(nest).values()
    for child in children:
        yield from _tensors(child, (*within, id(nest)))


def _nearest(roots: Iterable[Node | None], made_by: Mapping[Node, str]) -> Iterator[str]:
    """Search the graph backwards from ``roots`` and yield the nearest layer on each path."""
    stack = [node for node in roots if node is not None]
    visited: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        if node in made_by:
            yield made_by[node]
        else:
            stack.extend(before for before, _ in node.next_functions if before is not None)
