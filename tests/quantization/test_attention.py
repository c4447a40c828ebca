# SPDX-License-Identifier: Apache-2.0
"""Quantized attention: off by default; if on, both operands of both matrix products are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization import (
    QuantizationConfig,
    QuantizationReport,
    QuantizedAttention,
    QuantMatmul,
    calibrating,
    prepare,
    quantizers,
    register_quantized_attention,
    set_quantization,
)


class Attention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


@register_quantized_attention(Attention)
class QuantAttention(QuantizedAttention, Attention):
    """Its adapter."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.proj(self.probability_value(self.query_key(q, k.transpose(1, 2)).softmax(-1), v))


class GatedAttention(Attention):
    """Computes something else."""


class Blocks(nn.Module):
    """Two attentions between two layers."""

    def __init__(self, second: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.first = Attention()
        self.second = second()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(x))))


@pytest.fixture
def tokens() -> Tensor:
    """Two images of five tokens."""
    return torch.randn(2, 5, 3)


def _prepare(model: nn.Module, x: Tensor, **config: Any) -> QuantizationReport:
    return prepare(model, QuantizationConfig.from_dict(config), run=lambda: model(x))


def test_products_stay_float_by_default(tokens: Tensor) -> None:
    """The report does not list them either."""
    model = Blocks()
    report = _prepare(model, tokens)
    assert type(model.first) is Attention
    assert [row.name for row in report.layers if 'query' in row.name] == []


def test_both_operands_of_both_products_are_quantized(tokens: Tensor) -> None:
    """Each by its own step and zero point, compared with the formula written out."""
    model = Blocks()
    _prepare(model, tokens, attention=dict(operand_bits=3, probability_bits=4))
    with torch.no_grad(), calibrating(model):
        model(tokens)
    attention = model.first
    x = model.embed(tokens)
    seen: dict[str, Tensor] = {}
    for name, quantizer in quantizers(attention):
        if '.left' in name or '.right' in name:
            quantizer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    output = attention(x)

    def on_grid(name: str, levels: int) -> Tensor:
        quantizer = dict(quantizers(attention))[name]
        zero = 0.0 if quantizer.zero_point is None else quantizer.zero_point
        integers = ((seen[name] / quantizer.step).round() + zero).clamp(0, levels - 1)
        return (integers - zero) * quantizer.step

    q, k = (on_grid(f'query_key.{side}_quantizer', 8) for side in ('left', 'right'))
    torch.testing.assert_close(seen['probability_value.left_quantizer'], (q @ k).softmax(-1))
    probability = on_grid('probability_value.left_quantizer', 16)
    value = on_grid('probability_value.right_quantizer', 8)
    torch.testing.assert_close(output, attention.proj(probability @ value))
    set_quantization(model, False)
    torch.testing.assert_close(attention(x), Attention.forward(attention, x))


def test_probabilities_are_unsigned_whatever_the_inputs_are(tokens: Tensor) -> None:
    model = Blocks()
    _prepare(model, tokens, attention=8, activation=dict(scheme='signed'))
    schemes = {name: quantizer.scheme for name, quantizer in quantizers(model.first) if 'probability' in name}
    assert schemes == {
        'probability_value.left_quantizer': 'unsigned',
        'probability_value.right_quantizer': 'signed',
    }
    assert model.first.query_key.left_quantizer.scheme == 'signed'


def test_the_report_lists_each_product_with_its_operations(tokens: Tensor) -> None:
    """2 images of 5 x 5 scores of 6 channels; products are never first or last layers."""
    model = Blocks()
    report = _prepare(model, tokens, w_bits=4, a_bits=4, attention=dict(operand_bits=6, probability_bits=8))
    rows = {row.name: row for row in report.layers if row.type == 'matmul'}
    assert list(rows) == [
        f'{block}.{product}' for block in ('first', 'second') for product in ('query_key', 'probability_value')
    ]
    product = rows['first.probability_value']
    assert (product.w_bits, product.a_bits, product.weights, product.role, product.macs) == (6, 8, 0, '', 300)
    assert rows['first.query_key'].a_bits == 6
    assert {row.name for row in report.layers if row.role} == {'embed', 'head'}
    with torch.no_grad(), calibrating(model):
        model(tokens)
    row = next(row for row in report.to_dict()['layers'] if row['name'] == 'first.probability_value')
    assert (row['input']['scheme'], row['input']['qmax']) == ('unsigned', 255)
    assert len(row['weight']['steps']) == 1
    assert 'first.query_key' in report.to_table()


def test_patterns_decide_for_attention_too(tokens: Tensor) -> None:
    """skip, overrides and scope, by the name of the attention module or one around it."""
    model = Blocks()
    report = _prepare(model, tokens, attention=8, overrides={'first': 5}, skip=['second'])
    rows = {row.name: row for row in report.layers}
    assert rows['first.query_key'].a_bits == 5
    assert (rows['second'].quantized, rows['second'].reason) == (False, "skip 'second'")
    assert type(model.second) is Attention
    report = _prepare(Blocks(), tokens, attention=8, scope='second', first_bits='same', last_bits='same')
    assert {row.reason for row in report.layers if row.name == 'first'} == {"outside scope 'second'"}


class BiasedAttention(nn.Module):
    """PyTorch's attention with a learned key and value beside the given ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 1, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize('other', [GatedAttention, BiasedAttention])
def test_attention_without_an_adapter_stays_float_with_the_reason(tokens: Tensor, other: Any) -> None:
    """A subclass, and PyTorch's attention with settings that the adapter does not support."""
    model = Blocks(other)
    report = _prepare(model, tokens, attention=8)
    reasons = [row.reason for row in report.layers if row.name.startswith('second') and 'adapter' in row.reason]
    assert len(reasons) == 1
    assert isinstance(model.first.query_key, QuantMatmul)
    set_quantization(model, False)
    model(tokens)


def test_quantizing_attention_that_does_not_exist_is_an_error(tokens: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(UserError, match='attention is set, but no attention.*no attention module is known in it'):
        _prepare(model, tokens, attention=8)


def test_an_attention_that_does_not_run_stays_a_plain_product(tokens: Tensor) -> None:
    model = Blocks()
    model.spare = Attention()
    report = _prepare(model, tokens, attention=8)
    assert {row.reason for row in report.layers if row.name == 'spare'} == {'did not run'}
    with torch.no_grad(), calibrating(model):
        model(tokens)
    model.spare(torch.randn(1, 5, 6))


def test_a_product_without_input_is_named(tokens: Tensor) -> None:
    model = Blocks()
    _prepare(model, tokens, attention=8)
    with pytest.raises(UserError, match=r'No input reached.*first\.query_key, .*while calibrating'), calibrating(model):
        pass
