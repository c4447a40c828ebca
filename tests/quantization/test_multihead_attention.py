# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention`` is decomposed without a change of its outputs, and quantized like other layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmzsq.quantization import QuantizationConfig, calibrating, prepare, quantized_layers, set_quantization
from mmzsq.quantization.multihead_attention import decompose_attention

LAYERS = ('query_projection', 'key_projection', 'value_projection', 'out_proj')


class Block(nn.Module):
    """Attention between two layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x)[0])


def quantize(model: nn.Module, **options: Any) -> Any:
    report = prepare(model, QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4, **options)), lambda: model(TOKENS))
    with torch.no_grad(), calibrating(model):
        model(TOKENS)
    return report


TOKENS = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, float('-inf'))


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('channels', [dict(), dict(kdim=3, vdim=5)], ids=['same', 'other'])
@pytest.mark.parametrize('bias', [False, True])
def test_a_decomposed_module_computes_the_same_as_pytorchs(
    batch_first: bool, channels: dict[str, int], bias: bool
) -> None:
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, **channels).eval()
    opened = copy.deepcopy(attention)
    decompose_attention(opened)
    assert type(opened) is not nn.MultiheadAttention
    assert opened.state_dict().keys() == attention.state_dict().keys()
    sizes = ((4, 8), (6, channels.get('kdim', 8)), (6, channels.get('vdim', 8)))
    inputs = [torch.randn(3, n, c) if batch_first else torch.randn(n, 3, c) for n, c in sizes]
    visible = torch.rand(3, 6) < 0.7
    visible[:, 0] = True
    looks = torch.rand(4, 6) < 0.7
    looks[:, 0] = True
    heads = (torch.rand(6, 4, 6) < 0.7) | looks
    for masks in (
        dict(),
        dict(key_padding_mask=~visible),
        dict(attn_mask=~looks, average_attn_weights=False),
        dict(attn_mask=additive(heads), key_padding_mask=additive(visible)),
        dict(need_weights=False),
    ):
        torch.testing.assert_close(opened(*inputs, **masks), attention(*inputs, **masks))
    alone = [(x[0] if batch_first else x[:, 0]) for x in inputs]
    torch.testing.assert_close(opened(*alone, attn_mask=~looks), attention(*alone, attn_mask=~looks))


def test_all_four_layers_are_quantized_and_learn() -> None:
    model = Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = quantize(model)
    bits = {layer.name: (layer.w_bits, layer.a_bits, layer.macs) for layer in report.layers}
    # Ten tokens, eight channels in and out.
    assert {name: bits[f'attention.{name}'] for name in LAYERS} == dict.fromkeys(LAYERS, (4, 4, 640))
    assert model.attention.query_projection.weight_quantizer.num_steps == 8
    model(TOKENS).square().sum().backward()
    learned = {n: p for n, p in model.named_parameters() if n.startswith('attention.') and not n.endswith('bias')}
    assert len(learned) == 2 + 4 * 2
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned.values())
    rows = model.attention.in_proj_weight.grad.view(3, -1)
    assert all(row.any() for row in rows)
    model.load_state_dict(before, strict=False)
    assert all('_quantizer.' in name for name in set(model.state_dict()) - set(before))


def test_each_projection_is_quantized_by_the_steps_of_its_rows() -> None:
    model = Block()
    quantize(model)
    seen: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model):
        layer.weight_quantizer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.detach()}))
    model(TOKENS)
    rows = model.attention.in_proj_weight.detach().chunk(3)
    for name, float_rows in zip(LAYERS, rows, strict=False):
        quantized = seen[f'attention.{name}']
        layer = model.attention.get_submodule(name)
        step = layer.weight_quantizer.step.detach().view(-1, 1)
        codes = quantized / step
        torch.testing.assert_close(codes, codes.round())
        assert ((quantized - float_rows).abs() <= step).all()
        assert not torch.equal(quantized, float_rows)


def test_disabled_it_equals_the_float_module_and_a_copy_is_independent() -> None:
    model = Block()
    expected = model(TOKENS)
    quantize(model)
    assert not torch.allclose(model(TOKENS), expected, atol=1e-4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.attention.in_proj_weight.zero_()
    for detector, same in ((twin, True), (model, False)):
        set_quantization(detector, False)
        assert torch.allclose(detector(TOKENS), expected, atol=1e-5) == same


def test_its_products_can_be_quantized_too() -> None:
    model = Block()
    report = quantize(model, attention=4)
    products = [layer.name for layer in report.layers if layer.type == 'matmul']
    assert products == ['attention.query_key', 'attention.probability_value']
    assert model.attention.probability_value.left_quantizer.scheme == 'unsigned'
    assert torch.isfinite(model(TOKENS)).all()


def test_frozen_projections_learn_once_they_are_unfrozen() -> None:
    model = Block().requires_grad_(False)
    quantize(model)
    model.attention.query_projection.requires_grad_(True)
    assert model.attention.in_proj_weight.requires_grad
    assert not model.attention.out_proj.weight.requires_grad


@pytest.mark.parametrize('options', [dict(add_bias_kv=True), dict(add_zero_attn=True)])
def test_attention_with_learned_keys_stays_float_with_the_reason(options: dict[str, bool]) -> None:
    model = Block(**options)
    report = quantize(model)
    rows = {layer.name: layer for layer in report.layers}
    assert rows['attention.in_proj_weight'].reason == 'a parameter that is not the weight of a known layer'
    assert not rows['attention.in_proj_weight'].quantized
    assert not rows['attention.out_proj'].quantized and rows['attention.out_proj'].reason


@pytest.mark.parametrize('stacked', [False, True])
def test_an_encoder_layer_of_pytorch_is_quantized_without_gradients_too(stacked: bool) -> None:
    """In eval mode without gradients, PyTorch computes the float layer by one operator."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2) if stacked else layer
    model = nn.Sequential(nn.Linear(3, 8), encoder, nn.Linear(8, 2)).eval()
    with torch.no_grad():
        before = model(TOKENS)
    quantize(model, first_bits='same', last_bits='same')
    # Gradients turn that operator off.
    expected = model(TOKENS.clone().requires_grad_()).detach()
    with torch.no_grad():
        found = model(TOKENS)
    torch.testing.assert_close(found, expected)
    assert float((found - before).abs().max()) > 1e-2
    set_quantization(model, False)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), before)
