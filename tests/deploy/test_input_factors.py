# SPDX-License-Identifier: Apache-2.0
"""Export of learned input factors: files hold the trained integers, and divide by the trained factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmzsq.deploy.graph import Graph
from tests.quantized_networks import quantized

Check = Callable[..., Any]


def _trained(x: torch.Tensor, **config: Any) -> Any:
    """An inverted residual block whose factors, steps and weights were trained for a few iterations."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_var.uniform_(0.1, 3.0)  # type: ignore[union-attr]
    quantized(model, x, **config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize('target', ['openvino', 'onnxruntime'])
@pytest.mark.parametrize(('bits', 'equalize'), [(4, 'depthwise'), (8, 'depthwise'), (4, 'learned')])
def test_a_file_holds_integers_and_factors_of_training(
    assert_same: Check, target: str, bits: int, equalize: str
) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = _trained(x, w_bits=bits, a_bits=bits, equalize=equalize)
    built = assert_same(model, x, target)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, 'log_input_scale')}
    assert list(layers) == (['3'] if equalize == 'depthwise' else ['0', '3', '6'])
    for use in built.uses:
        layer: Any = model.get_submodule(use.layer)
        # By hand: each input channel of the weight times its factor, then rounded.
        weight = layer.weight.detach().clone()
        if use.layer in layers:
            scale = layer.log_input_scale.detach().exp()
            weight = weight * (scale.view(-1, 1, 1, 1) if layer.groups > 1 else scale.view(1, -1, 1, 1))
        step = layer.weight_quantizer.step.detach().view(-1, 1, 1, 1)
        low = layer.weight_quantizer.qmin
        integers = (weight / step).round().clamp(low, layer.weight_quantizer.qmax).numpy().astype(np.int8)
        bn = model[int(use.layer) + 1]
        sign = np.where(bn.weight.detach().numpy() < 0, -1, 1).reshape(-1, 1, 1, 1)
        assert np.array_equal(use.integers, integers * sign)
    graph = Graph(built.model)
    divisors = [graph.constants[node.input[1]].ravel() for node in graph.nodes if node.op_type == 'Div']
    expected = [layer.log_input_scale.detach().exp().numpy() for layer in layers.values()]
    assert len(divisors) == len(expected) and all(map(np.array_equal, divisors, expected))
    # The detector is as it was.
    assert not any(hasattr(layer, 'input_scale') for layer in layers.values())


def test_the_dynamo_exporter_holds_the_factors_too(assert_same: Check) -> None:
    pytest.importorskip('onnxscript')
    x = torch.randn(2, 4, 8, 8)
    assert_same(_trained(x, w_bits=4, a_bits=4), x, exporter='dynamo')


@pytest.mark.parametrize('bits', [4, 8])
def test_an_open_batch(assert_same: Check, bits: int) -> None:
    x = torch.randn(2, 4, 8, 8)
    assert_same(_trained(x, w_bits=bits, a_bits=bits), x, dynamic_batch=True, output_names=['y'])
