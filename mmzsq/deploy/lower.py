# SPDX-License-Identifier: Apache-2.0
"""Replacement of markers by QuantizeLinear and DequantizeLinear, with the trained integers as initializers.

Weights are not rounded again: the initializers hold the integers that ``weight_quantizer.quantize`` returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from onnx import NodeProto

from mmzsq.deploy.dialects import container
from mmzsq.deploy.graph import Graph
from mmzsq.deploy.markers import ActivationGrid, WeightGrid, markers
from mmzsq.deploy.place import is_settled
from mmzsq.errors import UserError

LAYOUT = ('Reshape', 'Transpose', 'Squeeze', 'Unsqueeze', 'Flatten')
"""Operators that rearrange a weight between its quantizer and the operator that multiplies by it."""


@dataclass(eq=False)
class WeightUse:
    """One operator that reads one weight.

    Attributes:
        layer: Name of the layer.
        call: Number of this call of the layer, from 0.
        bits: 2 to 8.
        integers: int8, in the layout that the operator reads.
        step: float32 of shape (), or (C,) along ``axis``.
        axis: Axis of ``integers`` that the steps lie along. None if there is one step.
        node: The operator.
        value: Name of its input that takes the dequantized weight.
        folded: Name of the scale of the folded BatchNorm, else None.
        unfolded: Reason why the BatchNorm behind the operator was not folded, else None.
    """

    layer: str
    call: int
    bits: int
    integers: np.ndarray
    step: np.ndarray
    axis: int | None
    node: NodeProto
    value: str
    folded: str | None = field(default=None)
    unfolded: str | None = field(default=None)


def number_calls(graph: Graph) -> None:
    """Renumber the calls of each quantizer from 0 in the order of the graph.

    The dynamo exporter may trace a module several times, which leaves gaps.
    """
    calls: dict[str, list[int]] = {}
    for name, call, _ in markers(graph):
        calls.setdefault(name, []).append(call)
    for name, call, node in markers(graph):
        number = sorted(set(calls[name])).index(call)
        next(entry for entry in node.attribute if entry.name == 'call').i = number


def detach_weights(graph: Graph, weights: dict[str, WeightGrid]) -> list[WeightUse]:
    """Remove the markers of weights. :func:`attach_weights` later writes the returned uses as initializers.

    Reshapes and transposes between a marker and its reader are applied to the integers.

    Args:
        graph: A marked graph. It is edited.
        weights: Grids by the name of the quantizer.

    Returns:
        One use for each operator that reads a weight, in the order of the graph.
    """
    uses = []
    for name, call, node in markers(graph):
        if name in weights:
            uses += _detach(graph, weights[name], call, node)
    return uses


def _detach(graph: Graph, grid: WeightGrid, call: int, marker: NodeProto) -> list[WeightUse]:
    integers = grid.integers
    channel = np.broadcast_to(np.arange(len(integers)).reshape(-1, *(1,) * (integers.ndim - 1)), integers.shape)
    uses: list[WeightUse] = []
    pending = [marker.output[0]]
    while pending:
        value = pending.pop()
        laid_out = graph.evaluate(value, {marker.output[0]: integers.astype(np.float32)})
        index = graph.evaluate(value, {marker.output[0]: channel.astype(np.float32)})
        assert laid_out is not None and index is not None
        located = _steps_along(index.astype(np.int64), grid.step)
        for reader in graph.consumers(value):
            if reader.op_type in LAYOUT and value == reader.input[0]:
                chained = graph.evaluate(reader.output[0], {marker.output[0]: channel.astype(np.float32)})
                if chained is not None and _steps_along(chained.astype(np.int64), grid.step) is not None:
                    pending.append(reader.output[0])
                    continue
            if reader.op_type == 'Shape':
                continue
            assert located is not None, 'the filters lie along their first axis before anything rearranges them'
            step, axis = located
            placeholder = graph.fresh(f'{grid.layer}/weight/{call}')
            for position, source in enumerate(reader.input):
                if source == value:
                    graph.set_input(reader, position, placeholder)
            uses.append(
                WeightUse(grid.layer, call, grid.bits, laid_out.astype(np.int8), step, axis, reader, placeholder)
            )
    for reader in graph.consumers(marker.output[0]):
        # Sizes that only reshapes read.
        shape = np.asarray(integers.shape, dtype=np.int64)
        if reader.op_type == 'Shape':
            name = graph.constant(shape, f'{grid.layer}/shape')
            graph.replace_uses(reader.output[0], name)
            graph.remove([reader])
    graph.remove([marker])
    return uses


def _steps_along(channel: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, int | None] | None:
    """Find the axis that the output channels lie along.

    Args:
        channel: Number of the output channel at each place of a weight.
        step: One step, or one for each output channel.

    Returns:
        Steps along an axis and the axis, ``(step, None)`` for one step, or None if there is no such axis.
    """
    if step.size == 1:
        return step.reshape(()), None
    for axis in range(channel.ndim):
        along = np.moveaxis(channel, axis, 0).reshape(channel.shape[axis], -1)
        if (along == along[:, :1]).all():
            return step[along[:, 0]], axis
    return None


def attach_weights(graph: Graph, uses: list[WeightUse], int4: bool = False) -> list[str]:
    """Write weights as integer initializers with a DequantizeLinear for each reader.

    Args:
        graph: The graph that the uses come from.
        uses: Result of :func:`detach_weights`. BatchNorms may be folded in.
        int4: Store weights of at most 4 bits as INT4 if their integers fit. This is a storage format: engines compute
            no 4-bit convolutions.

    Returns:
        Names of the layers that are stored as INT4.
    """
    stored: dict[tuple[str, str, bytes], str] = {}
    packed = []
    for use in uses:
        integers = use.integers
        if int4 and use.bits <= 4 and integers.min(initial=0) >= -8 and integers.max(initial=0) <= 7:
            integers = integers.astype(ml_dtypes.int4)
            packed.append(use.layer)
        key = (use.layer, f'{integers.dtype} {integers.shape}', integers.astype(np.int8).tobytes())
        if key not in stored:
            stored[key] = graph.constant(integers, f'{use.layer}.weight_integers')
        step = graph.constant(use.step, f'{use.layer}.weight_step')
        attributes = {} if use.axis is None else {'axis': use.axis}
        graph.add(
            'DequantizeLinear',
            [stored[key], step],
            output=use.value,
            name=f'{use.layer}/weight/{use.call}/dequantize',
            **attributes,
        )
    return list(dict.fromkeys(packed))


def lower_activations(graph: Graph, activations: dict[str, ActivationGrid], target: str) -> None:
    """Replace the markers of activations by [Clip,] QuantizeLinear and DequantizeLinear.

    A grid of fewer than 8 bits gets a Clip, which keeps its integers exact in the 8-bit type. If all values already lie
    on the grid, there is no Clip, because OpenVINO 2026.4 would compute it on integers and round some of them down.

    If a size is open, OpenVINO 2026.4 would merge the division by input factors, Clip and QuantizeLinear into one
    operator, which is wrong by 10 to 20 % of the largest output. A Max that changes no value prevents this.

    Args:
        graph: A marked graph.
        activations: Grids by the name of the quantizer.
        target: One of :data:`~mmzsq.deploy.dialects.TARGETS`.

    Raises:
        UserError: If the target cannot represent a grid.
    """
    for name, call, node in markers(graph):
        if name not in activations:
            raise UserError(f'{name} quantizes a value of the traced graph, but is not a quantizer of the detector.')
        grid = activations[name]
        held = container(name, grid, target)
        prefix = f'{name.removesuffix("_quantizer")}/{call}'
        value = node.input[0]
        if held.needs_clip and target == 'openvino' and graph.has_open_sizes and _is_divided(graph, value):
            lowest = graph.constant(np.finfo(np.float32).min, f'{prefix}/lowest')
            value = graph.add('Max', [value, lowest], name=f'{prefix}/barrier')
        if held.needs_clip and not is_settled(node):
            ends = (
                graph.constant(np.float32(integer - held.zero_point) * np.float32(grid.step), f'{prefix}/{end}')
                for integer, end in ((held.low, 'low'), (held.high, 'high'))
            )
            value = graph.add('Clip', [value, *ends], name=f'{prefix}/clip')
        step = graph.constant(np.float32(grid.step), f'{prefix}/step')
        zero_point = graph.constant(np.asarray(held.zero_point, dtype=held.dtype), f'{prefix}/zero_point')
        integers = graph.add('QuantizeLinear', [value, step, zero_point], name=f'{prefix}/quantize')
        output = graph.add('DequantizeLinear', [integers, step, zero_point], name=f'{prefix}/dequantize')
        graph.replace_uses(node.output[0], output)
        graph.remove([node])


def _is_divided(graph: Graph, value: str) -> bool:
    producer = graph.producer(value)
    return producer is not None and producer.op_type == 'Div' and producer.input[1] in graph.constants
