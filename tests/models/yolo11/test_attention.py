# SPDX-License-Identifier: Apache-2.0
"""The quantized attention of YOLO11 equals the float attention, except for the quantized products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmzsq.models import QuantSpatialAttention
from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG
from mmzsq.models.yolo11.layers import PSABlock
from mmzsq.quantization import QuantizationConfig, calibrating, prepare, set_quantization


@pytest.fixture
def model() -> nn.Module:
    """A block with two heads."""
    return nn.Sequential(PSABlock(128, NORM_CFG, ACT_CFG)).eval()


@pytest.fixture
def x() -> Tensor:
    """A map of 3 x 5 cells."""
    return torch.randn(2, 128, 3, 5)


def quantize(model: nn.Module, x: Tensor, **settings: Any) -> None:
    config = QuantizationConfig.from_dict(dict(attention=8, **settings))
    report = prepare(model, config, run=lambda: model(x))
    products = [row.name for row in report.layers if row.name.endswith(('query_key', 'probability_value'))]
    assert len(products) == 2
    with torch.no_grad(), calibrating(model):
        model(x)


def test_the_adapter_repeats_the_float_attention(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    quantize(model, x, activation=dict(init='lsq'))
    assert type(model[0].attn) is QuantSpatialAttention
    set_quantization(model, False)
    torch.testing.assert_close(model(x), expected)


def test_eight_bits_change_little_and_the_products_are_quantized(model: nn.Module, x: Tensor) -> None:
    expected = model(x).detach()
    quantize(model, x)
    seen: list[Tensor] = []
    product = model[0].attn.probability_value
    product.left_quantizer.register_forward_hook(lambda *args: seen.append(args[-1]))
    error = float((model(x) - expected).detach().norm() / expected.norm())
    assert 0 < error < 0.05
    levels = seen[0] / product.left_quantizer.step
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert levels.min() >= 0
