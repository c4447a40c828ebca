# SPDX-License-Identifier: Apache-2.0
"""All steps from a marked graph to a standard ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from mmzsq.deploy.dialects import (
    check_target,
    check_tensorrt,
    float_in_onnxruntime,
    float_in_tensorrt,
    keep_linear_in_integers,
    slice_scalar_gathers,
)
from mmzsq.deploy.fold import fold_batch_norms
from mmzsq.deploy.graph import Graph
from mmzsq.deploy.lower import WeightUse, attach_weights, detach_weights, lower_activations, number_calls
from mmzsq.deploy.markers import MarkedGraph
from mmzsq.deploy.place import drop_repeated, move_down, move_up, share
from mmzsq.errors import UserError

INT4_OPSET = 21


@dataclass
class BuiltGraph:
    """A lowered graph.

    Attributes:
        model: Standard ONNX with QuantizeLinear and DequantizeLinear.
        uses: Every operator that reads a weight, in the order of the graph.
        int4_layers: Names of the layers that are stored as INT4.
        slow: What the target computes in float although it is quantized: operators for ONNX Runtime, sentences for
            TensorRT. It is not known for OpenVINO before the file is loaded.
    """

    model: onnx.ModelProto
    uses: list[WeightUse]
    int4_layers: list[str]
    slow: list[str]


def build(
    marked: MarkedGraph, target: str = 'openvino', int4: bool = False, metadata: Mapping[str, str] | None = None
) -> BuiltGraph:
    """Lower a marked graph for a target.

    Args:
        marked: Result of :func:`~mmzsq.deploy.markers.export_marked`.
        target: One of :data:`~mmzsq.deploy.dialects.TARGETS`.
        int4: Store weights of at most 4 bits as INT4. This makes the file smaller and nothing faster.
        metadata: Entries for the file.

    Returns:
        The model, the use of each weight, and the names of the layers that are stored as INT4.

    Raises:
        UserError: If the target is unknown or cannot represent the model.
    """
    check_target(target)
    graph = Graph(marked.model)
    number_calls(graph)
    graph.fold_constants()
    uses = detach_weights(graph, marked.weights)
    fold_batch_norms(graph, uses)
    if target != 'openvino':
        move_down(graph, marked.activations)
    drop_repeated(graph, marked.activations)
    share(graph, marked.activations)
    move_up(graph, marked.activations, target == 'onnxruntime')
    share(graph, marked.activations)
    int4_layers = attach_weights(graph, uses, int4)
    lower_activations(graph, marked.activations, target)
    if target == 'onnxruntime':
        keep_linear_in_integers(graph)
    if target == 'openvino':
        slice_scalar_gathers(graph)
    if target == 'tensorrt':
        problems = check_tensorrt(graph)
        if problems:
            raise UserError(f'The graph breaks a rule of TensorRT: {problems[0]}')
    slow = {'onnxruntime': float_in_onnxruntime, 'tensorrt': float_in_tensorrt}.get(target)
    if int4_layers:
        graph.set_opset(INT4_OPSET)
    return BuiltGraph(graph.to_model(metadata), uses, int4_layers, slow(graph) if slow else [])
