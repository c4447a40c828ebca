# SPDX-License-Identifier: Apache-2.0
"""The quantized window attention of Swin equals MMDetection's attention, except for the quantized products."""

from __future__ import annotations

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer, WindowMSA
from torch import Tensor, nn

from mmzsq.models import QuantWindowMSA
from mmzsq.quantization import QuantizationConfig, calibrating, prepare, set_quantization


@pytest.fixture
def swin() -> nn.Module:
    """Two stages with shifted windows and a nonzero relative position bias."""
    model = SwinTransformer(
        embed_dims=8, depths=(2, 2), num_heads=(2, 4), window_size=4, strides=(4, 2), out_indices=(0, 1)
    )
    # Its train() returns nothing, and so does eval().
    model.eval()
    for module in model.modules():
        if isinstance(module, WindowMSA):
            nn.init.normal_(module.relative_position_bias_table)
    return model


@pytest.fixture
def images() -> Tensor:
    """Images whose size is not a multiple of the window, so that padding is needed."""
    return torch.randn(2, 3, 56, 40)


def _prepare(model: nn.Module, images: Tensor) -> None:
    config = QuantizationConfig.from_dict(dict(attention=8, activation=dict(init='lsq')))
    prepare(model, config, run=lambda: model(images))


def test_the_adapter_repeats_the_float_attention(swin: nn.Module, images: Tensor) -> None:
    """Includes shifted windows with their mask and the gradients of bias and weights."""
    expected = swin(images)
    sum(level.square().sum() for level in expected).backward()
    attention = swin.stages[0].blocks[1].attn.w_msa
    gradients = [p.grad.clone() for p in attention.parameters()]
    swin.zero_grad()
    _prepare(swin, images)
    assert type(attention) is QuantWindowMSA
    set_quantization(swin, False)
    outputs = swin(images)
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference)
    sum(level.square().sum() for level in outputs).backward()
    for parameter, reference in zip((p for p in attention.parameters() if p.grad is not None), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-4)


def test_eight_bits_change_little_and_the_products_are_quantized(swin: nn.Module, images: Tensor) -> None:
    expected = swin(images)
    _prepare(swin, images)
    with torch.no_grad(), calibrating(swin):
        swin(images)
    for output, reference in zip(swin(images), expected, strict=True):
        error = float((output - reference).detach().norm() / reference.detach().norm())
        assert 0 < error < 0.05
    product = swin.stages[0].blocks[1].attn.w_msa.probability_value
    seen: list[Tensor] = []
    product.left_quantizer.register_forward_hook(lambda *args: seen.append(args[-1]))
    swin(images)
    levels = seen[0] / product.left_quantizer.step
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
