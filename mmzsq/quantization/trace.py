# SPDX-License-Identifier: Apache-2.0
"""Which layers come first and last, and how much they compute, from one run of the model.

No graph is traced ahead: the model runs once with autograd on, and the graph that autograd leaves
behind is walked. A layer is *last* if the outputs reach it without passing another layer, or if
no other layer reads what it made: proposals of a two-stage detector are cut off from the graph. It
is *first* if nothing that led to its input passed another.
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
    """What one run showed of each layer.

    Attributes:
        first: Names of layers with no other layer before them.
        last: Names of layers with no other layer between them and the outputs, or that no other
            layer reads.
        macs: Multiply-accumulate operations by layer name, summed over the run; a layer that did
            not run is missing.
    """

    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    macs: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> Trace:
    """Run the model once, in eval mode, and see which layers come first and last.

    Args:
        model: The model; its modes and ``requires_grad`` flags are as before afterwards, and no
            gradient is kept.
        layers: Convolutions, linear layers and products of activations by name.
        run: Runs the model on some input and returns its raw outputs, tensors in any nest of
            tuples, lists, dicts and objects with ``__dict__``. Predictions after decoding and NMS
            do not serve: they may lose the graph.

    Returns:
        The first and last layers, and operations of all.

    Raises:
        UserError: If no output depends on a layer.
    """
    result = Trace()
    made_by: dict[Node, str] = {}
    causes: list[tuple[str, list[Node | None]]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            sources = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            result.macs[name] = result.macs.get(name, 0) + _macs(layer, sources[0], output)
            if output.grad_fn is not None:
                # What changes a view in place goes on from its base, as after a linear layer of several dimensions.
                own = {output.grad_fn, output._base.grad_fn} if output._is_view() else {output.grad_fn}
                made_by.update(dict.fromkeys(own, name))
                # Not the inputs: a layer may own others, as a deformable convolution owns that of its offsets.
                causes.append((name, [n for node in own for n, _ in node.next_functions if n not in own]))

        return hook

    with ExitStack() as undo:
        undo.enter_context(_differentiable_eval(model, layers.values()))
        for name, layer in layers.items():
            undo.callback(layer.register_forward_hook(watch(name), with_kwargs=True).remove)
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
    """Multiply-accumulates of one call: one filter, or one row of the left operand, for each output value."""
    if isinstance(layer, QuantMatmul):
        return output.numel() * source.shape[-1]
    values = source if getattr(layer, 'transposed', False) else output
    return values.numel() * weight_of(layer)[0].numel()


@contextmanager
def _differentiable_eval(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode, and gradients for the parameters of ``layers``, for a while."""
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
    """All tensors of a nest; ``within`` holds the ids of what is around it, against cycles."""
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
    """Walk the graph backwards from ``roots`` and yield each layer met, not going past it."""
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
