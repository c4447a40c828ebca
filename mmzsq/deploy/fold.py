# SPDX-License-Identifier: Apache-2.0
"""Folding of BatchNorm into step, sign and bias of a quantized convolution, without changing an integer.

    gain = gamma / sqrt(variance + eps)
    integers' = integers * sign(gain),  step' = step * |gain|,  bias' = beta + (bias - mean) * gain

computed in float64.
"""

from __future__ import annotations

import numpy as np

from mmzsq.deploy.dialects import WEIGHTED
from mmzsq.deploy.graph import Graph, attribute
from mmzsq.deploy.lower import WeightUse

LEAST_STEP = 1e-30
"""Step of a channel with a gamma of 0. Engines require positive steps, and such products vanish beside the bias."""


def fold_batch_norms(graph: Graph, uses: list[WeightUse]) -> None:
    """Fold every BatchNorm that directly follows a quantized convolution.

    A BatchNorm stays if the convolution's output has other readers, or if a negative gamma would turn the integer -128
    into 128, which is outside int8. :attr:`WeightUse.unfolded` holds the reason.

    Args:
        graph: Graph with detached weights. Nodes and biases are edited.
        uses: Weights of the graph. Integers, steps and axes are edited.
    """
    for use in uses:
        node = use.node
        if node.op_type not in WEIGHTED:
            continue
        readers = graph.consumers(node.output[0])
        if not any(reader.op_type == 'BatchNormalization' for reader in readers):
            continue
        bn = graph.only_consumer(node.output[0])
        use.unfolded = _fold(graph, use, bn) if bn is not None else 'its input has other readers'


def _fold(graph: Graph, use: WeightUse, bn: object) -> str | None:
    """Fold one BatchNorm. Return None, or the reason why it stays."""
    inputs, outputs = list(bn.input), list(bn.output)  # type: ignore[attr-defined]
    axis = WEIGHTED[use.node.op_type]
    grouped = use.node.op_type == 'ConvTranspose' and attribute(use.node, 'group', 1) != 1
    if grouped or use.axis not in (None, axis):
        return 'the output channels of the weight do not lie along one axis'
    values = [graph.evaluate(name) for name in inputs[1:5]]
    bias = graph.evaluate(use.node.input[2]) if _has_bias(use) else np.zeros(())
    if any(value is None for value in (*values, bias)):
        return 'its parameters are not constant'
    gamma, beta, mean, variance = (np.asarray(value, dtype=np.float64) for value in values)
    gain = gamma / np.sqrt(variance + attribute(bn, 'epsilon', 1e-5))  # type: ignore[arg-type]
    sign = np.where(gain < 0, -1, 1)
    shape = [1] * use.integers.ndim
    shape[axis] = -1
    integers = use.integers.astype(np.int16) * sign.reshape(shape)
    if integers.max(initial=0) > 127:
        return 'a negative gamma would turn the integer -128 into 128'
    use.integers = integers.astype(np.int8)
    use.step = np.maximum(use.step.astype(np.float64) * np.abs(gain), LEAST_STEP).astype(np.float32)
    use.axis = axis
    shifted = (beta + (np.asarray(bias, dtype=np.float64) - mean) * gain).astype(np.float32)
    name = graph.constant(shifted, f'{use.layer}.bias')
    if _has_bias(use):
        use.node.input[2] = name
    else:
        del use.node.input[2:]
        use.node.input.append(name)
    use.folded = inputs[1]
    graph.changed()
    graph.replace_uses(outputs[0], use.node.output[0])
    graph.remove([bn])  # type: ignore[list-item]
    return None


def _has_bias(use: WeightUse) -> bool:
    return len(use.node.input) > 2 and bool(use.node.input[2])
