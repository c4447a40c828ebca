# SPDX-License-Identifier: Apache-2.0
"""A softmax of large products may differ by the rounding that it amplifies, and by no more."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mmzsq.deploy.graph import Graph
from mmzsq.deploy.layer_checks import TOLERANCE, _Pieces


def attention_pieces(values: dict[str, Tensor]) -> _Pieces:
    """Return the check of a file that computes attention from queries, keys and values."""
    graph = helper.make_graph(
        [
            helper.make_node('MatMul', ['q', 'k'], ['products']),
            helper.make_node('Softmax', ['products'], ['weights'], axis=-1),
            helper.make_node('MatMul', ['weights', 'v'], ['attended']),
        ],
        'attention',
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name, x in values.items()],
        [helper.make_tensor_value_info('attended', TensorProto.FLOAT, [400, 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    pieces = object.__new__(_Pieces)
    pieces.graph = Graph(model)
    pieces.full, pieces.tensors, pieces.weights, pieces.runtime = model, {}, {}, 'onnxruntime'
    pieces.order = {id(node): index for index, node in enumerate(pieces.graph.nodes)}
    pieces.values = values
    return pieces


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Attention in float64, which rounds nothing that matters here."""
    return ((q.double() @ k.double() * scale).softmax(-1) @ v.double()).float()


@pytest.mark.parametrize('size', [1.0, 8.0])
def test_the_rounding_of_large_products_is_no_failure_but_another_scale_is(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((400, 32), (32, 400), (400, 16)))
    q, k = q * size, k * size
    pieces = attention_pieces(dict(q=q, k=k, v=v))
    difference, fault = pieces._check_between('attended', attend(q, k, v), None)
    assert fault is None
    # Products of up to 2,000 are rounded to steps of 0.0001.
    assert (difference > TOLERANCE) == (size > 1)
    _, fault = pieces._check_between('attended', attend(q, k, v, 1.01), None)
    assert fault is not None and np.isfinite(float(fault.split()[4]))
