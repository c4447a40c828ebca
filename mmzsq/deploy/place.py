# SPDX-License-Identifier: Apache-2.0
"""Placement of activation quantizers: equal ones are shared, and they move up through operators that keep values.

Rounding to a grid is monotone and acts on each value separately. Therefore ``Q(op(x)) == op(Q(x))`` bit for bit if
``op`` only selects or rearranges values, or takes maxima. A quantizer is repeated in front of such an operator and also
stays behind it. Engines replace the resulting DQ-op-Q by ``op`` on integers.
"""

from __future__ import annotations

from onnx import NodeProto, helper

from mmzsq.deploy.graph import Graph, attribute
from mmzsq.deploy.markers import DOMAIN, MARKER, ActivationGrid, markers

SETTLED = 'settled'
DATA_INPUTS = {
    'Concat': None,
    'Flatten': 1,
    'MaxPool': 1,
    'Reshape': 1,
    'Resize': 1,
    'Slice': 1,
    'Squeeze': 1,
    'Transpose': 1,
    'Unsqueeze': 1,
}
"""Operators that keep values, and the number of leading inputs that hold them; None for all."""


def share(graph: Graph, activations: dict[str, ActivationGrid]) -> int:
    """Merge quantizers of one value with equal grids.

    Args:
        graph: A marked graph.
        activations: Grids by the name of the quantizer.

    Returns:
        The number of markers removed.
    """
    first: dict[tuple[str, tuple[float, int, int, int]], NodeProto] = {}
    removed = 0
    for name, _, node in markers(graph):
        key = (node.input[0], _key(activations[name]))
        if key not in first:
            first[key] = node
        elif node.output[0] not in graph.outputs:
            graph.replace_uses(node.output[0], first[key].output[0])
            graph.remove([node])
            removed += 1
    return removed


def drop_repeated(graph: Graph, activations: dict[str, ActivationGrid]) -> int:
    """Remove quantizers of values that a quantizer with an equal grid has made.

    Args:
        graph: A marked graph.
        activations: Grids by the name of the quantizer.

    Returns:
        The number of markers removed.
    """
    removed = 0
    for name, _, node in markers(graph):
        above = graph.producer(node.input[0])
        if name not in activations or above is None or not _is_marker(above) or node.output[0] in graph.outputs:
            continue
        if _key(activations[attribute(above, 'name')]) == _key(activations[name]):
            graph.replace_uses(node.output[0], node.input[0])
            graph.remove([node])
            removed += 1
    return removed


def move_down(graph: Graph, activations: dict[str, ActivationGrid]) -> int:
    """Repeat quantizers behind operators that keep values of one input.

    An operator between two different grids would run in float.

    Args:
        graph: A marked graph.
        activations: Grids by the name of the quantizer.

    Returns:
        The number of markers added.
    """
    added = 0
    pending = list(markers(graph))
    while pending:
        name, call, marker = pending.pop()
        for reader in graph.consumers(marker.output[0]):
            value = reader.output[0]
            if reader.op_type == 'Concat' or not _keeps_values(reader) or reader.input[0] != marker.output[0]:
                continue
            behind = graph.consumers(value)
            equal = all(
                _is_marker(r) and _key(activations[attribute(r, 'name')]) == _key(activations[name]) for r in behind
            )
            if value in graph.outputs or equal:
                continue
            node = _marker(graph, name, call, value, f'{name}/down')
            graph.replace_uses(value, node.output[0])
            graph.insert(node)
            _settle(node)
            pending.append((name, call, node))
            added += 1
    graph.sort()
    return added


def move_up(graph: Graph, activations: dict[str, ActivationGrid], mixes_grids: bool = False) -> int:
    """Repeat quantizers in front of operators that keep values.

    Args:
        graph: A marked graph.
        activations: Grids by the name of the quantizer.
        mixes_grids: Whether the target's Concat takes inputs on grids of their own, so that a quantized input needs no
            second quantizer.

    Returns:
        The number of markers added.
    """
    added = 0
    pending = list(markers(graph))
    while pending:
        name, call, marker = pending.pop()
        value = marker.input[0]
        source = graph.producer(value)
        if source is None or not _keeps_values(source) or not _read_by_equals(graph, value, activations):
            continue
        if source.op_type == 'Slice' and graph.only_consumer(source.input[0]) is None:
            # Each slice may have a grid of its own, and would quantize the whole value.
            continue
        count = DATA_INPUTS[source.op_type]
        on_grid = True
        for index, data in enumerate(list(source.input)[:count]):
            above = graph.producer(data)
            if above is not None and _is_marker(above):
                if _key(activations[attribute(above, 'name')]) == _key(activations[name]):
                    continue
                if mixes_grids and source.op_type == 'Concat':
                    on_grid = False
                    continue
            if data in graph.constants:
                on_grid = False
                continue
            node = _marker(graph, name, call, data, f'{name}/up')
            graph.insert(node)
            graph.set_input(source, index, node.output[0])
            pending.append((name, call, node))
            added += 1
        if on_grid:
            for reader in graph.consumers(value):
                _settle(reader)
    graph.sort()
    return added


def is_settled(marker: NodeProto) -> bool:
    """Whether all values that a quantizer reads lie on its grid already."""
    return bool(attribute(marker, SETTLED, 0))


def _marker(graph: Graph, quantizer: str, call: int, value: str, name: str) -> NodeProto:
    """Make a marker that reads ``value``; it is not inserted yet."""
    output = graph.fresh(f'{value}/quantized')
    node = helper.make_node(MARKER, [value], [output], name=graph.fresh(name), domain=DOMAIN, call=call)
    node.attribute.append(helper.make_attribute('name', quantizer))
    return node


def _settle(marker: NodeProto) -> None:
    if not is_settled(marker):
        marker.attribute.append(helper.make_attribute(SETTLED, 1))


def _read_by_equals(graph: Graph, value: str, activations: dict[str, ActivationGrid]) -> bool:
    """Whether only quantizers with one grid read a value."""
    if value in graph.outputs:
        return False
    readers = graph.consumers(value)
    if not all(_is_marker(reader) for reader in readers):
        return False
    return len({_key(activations[attribute(reader, 'name')]) for reader in readers}) == 1


def _keeps_values(node: NodeProto) -> bool:
    if node.domain or node.op_type not in DATA_INPUTS:
        return False
    if node.op_type == 'Resize':
        return attribute(node, 'mode', 'nearest') == 'nearest'
    return node.op_type != 'MaxPool' or len(node.output) == 1


def _is_marker(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == MARKER


def _key(grid: ActivationGrid) -> tuple[float, int, int, int]:
    return grid.step, grid.zero_point, grid.qmin, grid.qmax
