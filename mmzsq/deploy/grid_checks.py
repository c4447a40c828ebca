# SPDX-License-Identifier: Apache-2.0
"""Integers and grids of an exported file, compared with those of training."""

from __future__ import annotations

import re

import numpy as np
from onnx import NodeProto
from torch import Tensor

from mmzsq.deploy.graph import Graph, attribute
from mmzsq.deploy.markers import ActivationGrid
from mmzsq.deploy.place import DATA_INPUTS

TIE = 1e-3
"""Distance from half way between two levels, in levels, within which engines may round in either direction."""
QUANTIZER_NAME = re.compile(r'(?P<name>.+)/(?P<call>\d+)/quantize(_\d+)?')


def integers_equal(
    graph: Graph, node: NodeProto, operator: NodeProto, trained: np.ndarray, sign: np.ndarray | int = 1
) -> bool:
    """Compare the integers of a DequantizeLinear with those of training.

    Args:
        graph: Graph that holds the node.
        node: The DequantizeLinear of a weight.
        operator: The operator that reads it.
        trained: Integers of training, (C_out, ...).
        sign: Sign of each output channel, that of the gamma of a folded BatchNorm; scalar or (C_out,).

    Returns:
        Whether all integers are equal.
    """
    stored = graph.constants[node.input[0]].astype(np.int32)
    transposed = operator.op_type in ('ConvTranspose', 'MatMul')
    axis = attribute(node, 'axis') if graph.constants[node.input[1]].ndim else None
    stored = np.moveaxis(stored, (1 if transposed else 0) if axis is None else axis, 0)
    if stored.shape != trained.shape:
        return False
    signs = np.broadcast_to(sign, len(trained))[:, None]
    return bool((stored.reshape(len(stored), -1) == trained.astype(np.int32).reshape(len(trained), -1) * signs).all())


def quantizer_name(node: NodeProto) -> str:
    """Name of the detector's quantizer that a QuantizeLinear stands for; empty if it names none."""
    match = QUANTIZER_NAME.fullmatch(node.name)
    return f'{match["name"]}_quantizer' if match else ''


def entry_of(graph: Graph, quantize: NodeProto) -> str:
    """Name of the value before a quantizer and its Clip."""
    clip = graph.producer(quantize.input[0])
    # A Clip that is part of the quantizer, not one of the network's.
    return clip.input[0] if clip is not None and _is_clip_of_quantizer(clip) else quantize.input[0]


def _is_clip_of_quantizer(node: NodeProto) -> bool:
    return node.op_type == 'Clip' and node.name.rstrip('_0123456789').endswith('/clip')


def grid_fault(graph: Graph, quantize: NodeProto, grid: ActivationGrid) -> str | None:
    """Say how a quantizer of a file differs from the grid of training."""
    parameters = [graph.constants[name] for name in quantize.input[1:3] if name in graph.constants]
    if [value.size for value in parameters] != [1, 1]:
        return 'the quantizer has no constant step and zero point.'
    step, zero_point = (value.reshape(()) for value in parameters)
    if step != np.float32(grid.step):
        return f'the step is {float(step):.9g}, but {np.float32(grid.step):.9g} in training.'
    for reader in graph.consumers(quantize.output[0]):
        if reader.op_type == 'DequantizeLinear' and any(
            not np.array_equal(graph.constants.get(name, np.zeros(0)), value)
            for name, value in zip(reader.input[1:3], parameters, strict=False)
        ):
            return 'DequantizeLinear has another step or zero point than QuantizeLinear.'
    info = np.iinfo(zero_point.dtype)
    low, high = info.min - int(zero_point), info.max - int(zero_point)
    clip = graph.producer(quantize.input[0])
    if clip is not None and _is_clip_of_quantizer(clip):
        ends = [graph.constants.get(name, np.full((), np.nan)) for name in clip.input[1:3]]
        levels = [float(end) / grid.step for end in ends]
        if not np.allclose(levels, np.round(levels), atol=TIE):
            return 'Clip does not end on levels of the grid.'
        low, high = max(low, round(levels[0])), min(high, round(levels[1]))
    else:
        settled = _settled_range(graph, quantize, grid)
        low, high = (low, high) if settled is None else settled
    expected = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    if (low, high) != expected:
        return (
            f'levels {low} to {high} around zero, but {expected[0]} to {expected[1]} in training: the zero point or '
            'Clip differs.'
        )
    return None


def _settled_range(graph: Graph, quantize: NodeProto, grid: ActivationGrid) -> tuple[int, int] | None:
    """Range of levels of a quantizer without Clip whose values all come from quantizers; None if others reach it."""
    info = np.iinfo(graph.constants[quantize.input[2]].dtype)
    pending, seen, found = [quantize.input[0]], set(), False
    while pending:
        name = pending.pop()
        producer = graph.producer(name)
        if name in seen:
            continue
        seen.add(name)
        if producer is None:
            return None
        if producer.op_type == 'DequantizeLinear':
            above = graph.producer(producer.input[0])
            if above is None or not _same_parameters(graph, above, quantize) or grid_fault(graph, above, grid):
                return None
            found = True
        elif producer.op_type in DATA_INPUTS and not producer.domain:
            pending += list(producer.input)[: DATA_INPUTS[producer.op_type]]
        else:
            return None
    if not found:
        return None
    zero_point = int(graph.constants[quantize.input[2]])
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    # The type must hold them, and nothing else arrives.
    return (low, high) if info.min <= low + zero_point and high + zero_point <= info.max else None


def _same_parameters(graph: Graph, first: NodeProto, second: NodeProto) -> bool:
    return all(
        np.array_equal(graph.constants[one], graph.constants[other])
        for one, other in zip(first.input[1:3], second.input[1:3], strict=True)
    )


def rounding_fault(x: Tensor, expected: Tensor, given: Tensor, grid: ActivationGrid) -> str | None:
    """Compare rounded inputs. Values half way between two levels may be rounded in either direction."""
    if given.shape != expected.shape or not bool(given.isfinite().all()):
        return 'its rounded input has another shape or is not finite.'
    levels = ((given - expected) / grid.step).abs()
    position = x.double() / grid.step
    tie = ((position - position.floor()) - 0.5).abs() < TIE
    wrong = (levels > TIE) & ~(tie & (levels < 1 + TIE))
    if bool(wrong.any()):
        return (
            f'{int(wrong.sum())} of {wrong.numel()} inputs are rounded to another level than in PyTorch, by up to '
            f'{float(levels[wrong].max()):.3g} levels.'
        )
    return None


def on_grid_values(values: Tensor, grid: ActivationGrid) -> Tensor:
    """Round values to a grid, as the quantizer of a layer does, in float64."""
    levels = (values.detach().cpu().double() / grid.step).round() + grid.zero_point
    return (levels.clamp(grid.qmin, grid.qmax) - grid.zero_point) * grid.step


def within_steps(expected: Tensor, given: np.ndarray, step: float) -> bool:
    """Whether values differ by at most two steps, and by half a step on average.

    Engines compute the functions between trained grids in integers, and round in another order than PyTorch.
    """
    difference = np.abs(expected.cpu().numpy() - given)
    return bool(difference.max(initial=0.0) <= 2.01 * step and difference.mean() <= 0.5 * step)
