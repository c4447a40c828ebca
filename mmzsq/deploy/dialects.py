# SPDX-License-Identifier: Apache-2.0
"""Integer types and rules of each target.

Activations for ``'openvino'`` and ``'onnxruntime'`` are uint8 with an integer zero point, whatever their scheme in
training, because OpenVINO 2026.4 computes wrong results for int8 activations behind a Concat. Activations for
``'tensorrt'`` are int8 with zero point 0.

The rules of TensorRT are documented in "Working with Quantized Types" and "Explicit Quantization" of NVIDIA's manual:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from mmzsq.deploy.graph import Graph, attribute
from mmzsq.deploy.markers import ActivationGrid
from mmzsq.errors import UserError
from mmzsq.typed_section import nearest

TARGETS = ('openvino', 'onnxruntime', 'tensorrt')
WEIGHTED = {'Conv': 0, 'ConvTranspose': 1}
"""Operators with a weight, and the axis of the output channels in the weight."""


@dataclass(frozen=True)
class Container:
    """8-bit type that holds a grid of 2 to 8 bits.

    Attributes:
        dtype: uint8 or int8.
        zero_point: Integer that represents zero in this type.
        low: Least integer of the grid in this type.
        high: Greatest integer of the grid in this type.
    """

    dtype: np.dtype
    zero_point: int
    low: int
    high: int

    @property
    def needs_clip(self) -> bool:
        """Whether the type has integers outside the grid. Its own saturation is then not enough."""
        info = np.iinfo(self.dtype)
        return (self.low, self.high) != (info.min, info.max)


def check_target(target: str) -> None:
    """Refuse an unknown target.

    Raises:
        UserError: Names what is allowed.
    """
    if target not in TARGETS:
        raise UserError(
            f'target is {target!r}, but must be one of {", ".join(map(repr, TARGETS))}.{nearest(target, TARGETS)}'
        )


def container(name: str, grid: ActivationGrid, target: str) -> Container:
    """Choose the 8-bit type of an activation.

    Args:
        name: Name of the quantizer, for the message.
        grid: The grid that was trained.
        target: One of :data:`TARGETS`.

    Returns:
        A type that represents every level of the grid exactly.

    Raises:
        UserError: If the grid has levels that the target cannot represent.
    """
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    if target != 'tensorrt':
        # Range from 0: the lower end saturates by itself.
        return Container(np.dtype(np.uint8), -low, 0, high - low)
    if low < -128 or high > 127:
        raise UserError(
            f'TensorRT takes int8 with zero point 0 alone, but {name} has {grid.bits} bits with zero point '
            f"{grid.zero_point}, which needs {low} to {high}: train with zsq.quantizer.target='tensorrt' or with at "
            'most 7 bits, or export with --target openvino.'
        )
    return Container(np.dtype(np.int8), 0, low, high)


def slice_scalar_gathers(graph: Graph) -> None:
    """Replace each Gather with one constant index by an equal Slice and Squeeze.

    OpenVINO 2026.4 moves a product with constants behind such a Gather and then multiplies along the wrong axis.

    Args:
        graph: A graph for OpenVINO.
    """
    for node in list(graph.nodes):
        index = graph.constants.get(node.input[1]) if node.op_type == 'Gather' else None
        if index is None or index.ndim or node.input[0] in graph.constants:
            continue
        start = int(index)
        end = start + 1 if start != -1 else np.iinfo(np.int64).max
        axis = np.asarray([attribute(node, 'axis', 0)], dtype=np.int64)
        ends = [graph.constant(np.asarray([at], dtype=np.int64), f'{node.name}/at') for at in (start, end)]
        axes = graph.constant(axis, f'{node.name}/axis')
        piece = graph.add('Slice', [node.input[0], *ends, axes], name=f'{node.name}/slice')
        output = graph.add('Squeeze', [piece, axes], name=f'{node.name}/squeeze')
        graph.replace_uses(node.output[0], output)
        graph.remove([node])


def check_tensorrt(graph: Graph) -> list[str]:
    """Check a lowered graph against the rules of explicit quantization in TensorRT.

    The rules are the documented ones. TensorRT itself is not run.

    Args:
        graph: A graph with QuantizeLinear and DequantizeLinear.

    Returns:
        One sentence for each violation, empty if there is none.
    """
    problems = []
    for node in graph.nodes:
        if node.op_type == 'QuantizeLinear':
            problems += _check_pair(graph, node.name, node.input)
            if any(reader.op_type != 'DequantizeLinear' for reader in graph.consumers(node.output[0])):
                problems.append(f'{node.name}: a quantized value is read by an operator other than DequantizeLinear.')
            if graph.constants[node.input[1]].ndim:
                problems.append(f'{node.name}: an activation has one step for each channel.')
        elif node.op_type == 'DequantizeLinear':
            problems += _check_pair(graph, node.name, node.input)
            if node.input[0] in graph.constants:
                problems += _check_weight(graph, node)
    return problems


def keep_linear_in_integers(graph: Graph) -> None:
    """Write linear layers in the form that ONNX Runtime computes in integers, whether a quantizer follows or not.

    ONNX Runtime 1.32 merges Gemm and MatMul with the DequantizeLinear of their inputs (QGemm, MatMulIntegerToFloat) if
    the one of the weight has a zero point, although this input is optional, and if the operator has no float bias. The
    bias is therefore added in float behind it, and is not rounded. Behind a MatMul, it has three dimensions: ONNX
    Runtime would merge one of fewer dimensions into a Gemm with a float bias.

    Args:
        graph: A lowered graph for ONNX Runtime.
    """
    for node in list(graph.nodes):
        if node.op_type not in ('Gemm', 'MatMul') or not _has_weight(graph, node):
            continue
        for value in list(node.input[:2]):
            source = graph.producer(value)
            if source is not None and source.op_type == 'DequantizeLinear' and len(source.input) == 2:
                integers, step = (graph.constants[name] for name in source.input)
                zero_point = np.zeros(step.shape, integers.dtype)
                source.input.append(graph.constant(zero_point, f'{source.name}/zero_point'))
                graph.changed()
        if node.op_type == 'Gemm' and len(node.input) > 2 and attribute(node, 'beta', 1.0) == 1.0:
            _detach_bias(graph, node)
        elif node.op_type == 'MatMul':
            # The exporters write a linear layer as MatMul if its input has three dimensions or more, else as Gemm.
            add = graph.only_consumer(node.output[0])
            for index, name in enumerate(add.input if add is not None and add.op_type == 'Add' else ()):
                bias = graph.constants.get(name)
                if add is not None and bias is not None and bias.ndim == 1:
                    graph.set_input(add, index, graph.constant(bias.reshape(1, 1, -1), name))


def _detach_bias(graph: Graph, gemm: NodeProto) -> None:
    """Replace the bias of a Gemm by an Add behind it."""
    bias, output = gemm.input[2], gemm.output[0]
    product = graph.fresh(f'{output}/product')
    del gemm.input[2:]
    gemm.output[0] = product
    graph.changed()
    graph.insert(helper.make_node('Add', [product, bias], [output], name=graph.fresh(f'{gemm.name}/bias')))
    graph.sort()


def float_in_onnxruntime(graph: Graph) -> list[str]:
    """List convolutions that ONNX Runtime computes in float, since no quantizer stands directly behind them.

    Args:
        graph: A lowered graph.

    Returns:
        Names of the operators with a dequantized weight, in the order of the graph. A ReLU between an operator and a
        quantizer does no harm.
    """
    found = []
    for node in graph.nodes:
        if node.op_type != 'Conv' or not _has_weight(graph, node):
            continue
        readers = graph.consumers(node.output[0])
        if len(readers) == 1 and readers[0].op_type == 'Relu':
            readers = graph.consumers(readers[0].output[0])
        if [reader.op_type for reader in readers] != ['QuantizeLinear']:
            found.append(node.name)
    return found


def float_in_tensorrt(graph: Graph) -> list[str]:
    """List additions and concatenations that TensorRT computes in float.

    It fuses the addition of a shortcut into the convolution before it if the shortcut is quantized, and it
    concatenates integers if all of them have one step.

    Args:
        graph: A lowered graph.

    Returns:
        One sentence for each, empty if there is none.
    """
    found = []
    for node in graph.nodes:
        if any(name in graph.constants for name in node.input):
            continue
        steps = [_step_of(graph, name) for name in node.input]
        if node.op_type == 'Add' and not any(steps) and _follows_layer(graph, node):
            found.append(f'{node.name}: neither operand of the addition is quantized.')
        readers = graph.consumers(node.output[0])
        quantized = bool(readers) and all(reader.op_type == 'QuantizeLinear' for reader in readers)
        if node.op_type == 'Concat' and quantized and len(set(steps)) != 1:
            found.append(f'{node.name}: the inputs of the concatenation have different steps, or none.')
    return found


def _has_weight(graph: Graph, node: NodeProto) -> bool:
    sources = (graph.producer(name) for name in node.input)
    return any(s is not None and s.op_type == 'DequantizeLinear' and s.input[0] in graph.constants for s in sources)


def _follows_layer(graph: Graph, node: NodeProto) -> bool:
    sources = [source for name in node.input if (source := graph.producer(name)) is not None]
    return any(source.op_type in WEIGHTED and _has_weight(graph, source) for source in sources)


def _step_of(graph: Graph, value: str) -> tuple[float, ...] | None:
    """The step of a quantized value, or its steps by channel; None if it is float."""
    source = graph.producer(value)
    if source is None or source.op_type != 'DequantizeLinear':
        return None
    return tuple(graph.constants[source.input[1]].ravel().tolist())


def _check_pair(graph: Graph, name: str, inputs: list[str]) -> list[str]:
    problems = []
    step = graph.constants.get(inputs[1])
    if step is None or not bool((step > 0).all()) or not bool(np.isfinite(step).all()):
        problems.append(f'{name}: the step is not a positive constant.')
    if len(inputs) > 2:
        zero_point = graph.constants.get(inputs[2])
        if zero_point is None or zero_point.dtype.name not in ('int8', 'int4'):
            problems.append(f'{name}: the integer type is not int8 or int4.')
        elif zero_point.astype(np.int32).any():
            problems.append(f'{name}: the zero point is not 0.')
    return problems


def _check_weight(graph: Graph, node: object) -> list[str]:
    name, inputs, output = node.name, node.input, node.output[0]  # type: ignore[attr-defined]
    if graph.constants[inputs[0]].dtype.name not in ('int8', 'int4'):
        return [f'{name}: the weight is not int8 or int4.']
    step = graph.constants[inputs[1]]
    if step.ndim == 0:
        return []
    axis = attribute(node, 'axis', 1)  # type: ignore[arg-type]
    return [
        f'{name}: steps lie along axis {axis}, which is not that of the output channels of {reader.op_type}.'
        for reader in graph.consumers(output)
        if axis != WEIGHTED.get(reader.op_type, axis)
    ]
