# SPDX-License-Identifier: Apache-2.0
"""From a float model to one that simulates integers: which layers, with how many bits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization.attention import (
    QuantizedAttention,
    QuantMatmul,
    is_attention,
    make_quantized_attention,
    quantized_attention_class,
)
from mmzsq.quantization.config import WHERE, AttentionBits, Bits, QuantizationConfig, matches
from mmzsq.quantization.equalize import add_input_scale, remove_input_scale
from mmzsq.quantization.modules import (
    QuantizedLayer,
    make_quantized,
    quantizable_bases,
    quantized_class,
    weight_of,
)
from mmzsq.quantization.multihead_attention import open_attention
from mmzsq.quantization.report import FLOAT_BITS, LayerReport, QuantizationReport
from mmzsq.quantization.trace import Trace, trace

NOT_RUN = 'did not run'


class _Attention(NamedTuple):
    """An attention module and what is to become of it; ``bits`` are ``None`` for float."""

    name: str
    module: nn.Module
    type: str
    bits: AttentionBits | None
    reason: str


def prepare(model: nn.Module, config: QuantizationConfig, run: Callable[[], Any] | None = None) -> QuantizationReport:
    """Swap the layers of a model for quantized ones, in place.

    Works on any eager model: layers are swapped by their class, nothing is traced or rewritten.
    Steps have no values yet; see :func:`mmzsq.quantization.calibrating`.

    Args:
        model: A float model. It stays on its device and in its modes.
        config: What to quantize and how.
        run: Runs ``model`` on one input, best a small one, and returns its raw outputs. It is
            called once, in eval mode, to find first and last layers and to count operations. It may
            be ``None`` if ``config.first_bits`` and ``config.last_bits`` are ``'same'``; then no
            operations are reported.

    Returns:
        A report of every layer that has a weight and, if ``config.attention`` is set, of the
        products of attention.

    Raises:
        UserError: If no layer, or no attention that is asked for, can be quantized, a pattern
            matches no layer, the model is prepared already, or first and last layers are asked for
            and cannot be found.
    """
    open_attention(model)
    layers = {name: module for name, module in model.named_modules() if _has_filters(module)}
    if any(isinstance(layer, QuantizedLayer) for layer in layers.values()):
        raise UserError('The model has quantized layers already; `prepare` takes a float model.')
    _check_patterns(config.patterns, layers)
    if run is None and config.needs_roles:
        raise UserError(
            'First and last layers are found by running the model: pass `run` to `prepare`, or set '
            f"{WHERE}.first_bits and {WHERE}.last_bits to 'same'."
        )
    known: dict[str, nn.Module] = {
        n: m
        for n, m in layers.items()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) or quantized_class(m) is not None
    }
    attention = [] if config.attention is None else _swap_attention(model, config)
    products = {n: m for n, m in model.named_modules() if isinstance(m, QuantMatmul)}
    seen = Trace() if run is None else trace(model, {**known, **products}, run)

    rows = [_convert(name, layer, config, seen, run is not None) for name, layer in layers.items()]
    if not any(row.quantized for row in rows):
        reasons = sorted({row.reason for row in rows})
        raise UserError(f'No layer of the model was quantized: {"; ".join(reasons) or "it has no weights"}.')
    for planned in attention:
        rows += _convert_attention(planned, config, seen, run is not None)
    rows += _other_parameters(model, layers.values())
    return QuantizationReport(model, rows)


def set_bits(layer: QuantizedLayer, config: QuantizationConfig, bits: Bits) -> None:
    """Give a quantized layer new quantizers, and factors of its input if it is to have any.

    Args:
        layer: It may have others, which go.
        config: What quantizers are made by.
        bits: Of weight and input.
    """
    remove_input_scale(layer)
    layer.add_quantizers(
        config.weight_quantizer(bits.w_bits, len(layer.filters())), config.input_quantizer(bits.a_bits)
    )
    if config.equalize and min(bits) < 8:
        add_input_scale(layer)


def _convert(name: str, layer: nn.Module, config: QuantizationConfig, seen: Trace, has_run: bool) -> LayerReport:
    float_class = type(layer)
    roles = [role for role, names in (('first', seen.first), ('last', seen.last)) if name in names]
    cls, bits, reason = _plan(name, layer, config, roles, seen, has_run)
    if cls is not None and bits is not None:
        set_bits(make_quantized(layer, cls), config, bits)
    return LayerReport(
        name=name,
        type=float_class.__name__,
        role=', '.join(roles),
        weights=weight_of(layer).numel(),
        w_bits=bits.w_bits if bits else FLOAT_BITS,
        a_bits=bits.a_bits if bits else FLOAT_BITS,
        reason=reason,
        macs=seen.macs.get(name, 0) if has_run else None,
    )


def _plan(
    name: str,
    layer: nn.Module,
    config: QuantizationConfig,
    roles: Sequence[str],
    seen: Trace,
    has_run: bool,
) -> tuple[type[QuantizedLayer] | None, Bits | None, str]:
    """The class to swap in and its bits, both ``None`` for float, and the reason."""
    cls = quantized_class(layer)
    if cls is None:
        bases = quantizable_bases(layer)
        kind = f'a {bases[0]} that may compute something else, ' if bases else ''
        return None, None, f'{kind}no quantized class is registered for {type(layer).__name__}'
    if has_run and name not in seen.macs:
        return None, None, f'{NOT_RUN}: unused, or its weight is read without calling it'
    bits, reason = config.bits_of(name, roles)
    return cls if bits else None, bits, reason


def _swap_attention(model: nn.Module, config: QuantizationConfig) -> list[_Attention]:
    """Replace inline products by modules, still float, so that the run sees them."""
    found = []
    for name, module in list(model.named_modules()):
        if is_attention(module):
            cls = quantized_attention_class(module)
            bits, reason = config.attention_bits_of(name)
            if cls is None:
                bits, reason = None, f'no adapter is registered for {type(module).__name__}'
            found.append(_Attention(name, module, type(module).__name__, bits, reason))
            if cls is not None and bits is not None:
                make_quantized_attention(module, cls)
    if not any(attention.bits for attention in found):
        reasons = sorted({attention.reason for attention in found})
        raise UserError(
            f'{WHERE}.attention is set, but no attention of the model can be quantized: '
            f'{"; ".join(reasons) or "it has none that is known"}. Set it to None.'
        )
    return found


def _convert_attention(
    attention: _Attention, config: QuantizationConfig, seen: Trace, has_run: bool
) -> list[LayerReport]:
    bits, reason = attention.bits, attention.reason
    names = [f'{attention.name}.query_key', f'{attention.name}.probability_value']
    if has_run and bits and names[0] not in seen.macs:
        bits, reason = None, NOT_RUN
    if bits is None:
        macs = 0 if has_run else None
        return [LayerReport(attention.name, attention.type, '', 0, FLOAT_BITS, FLOAT_BITS, reason, macs)]
    operand, probability = bits
    cast(QuantizedAttention, attention.module).add_quantizers(
        query=config.input_quantizer(operand),
        key=config.input_quantizer(operand),
        probability=config.input_quantizer(probability, scheme='unsigned'),
        value=config.input_quantizer(operand),
    )
    return [
        LayerReport(name, 'matmul', '', 0, operand, a_bits, reason, seen.macs[name] if has_run else None)
        for name, a_bits in zip(names, (operand, probability), strict=True)
    ]


def _other_parameters(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[LayerReport]:
    """What has two dimensions or more and is no layer's weight: queries, position biases, weights of an own kind."""
    listed = {weight_of(layer).untyped_storage().data_ptr() for layer in layers}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.untyped_storage().data_ptr() not in listed:
            reason = 'a parameter that no layer is known to multiply by'
            yield LayerReport(name, 'Parameter', '', parameter.numel(), FLOAT_BITS, FLOAT_BITS, reason, None)


def _has_filters(module: nn.Module) -> bool:
    """Whether a module holds a weight of two dimensions or more itself."""
    weight = getattr(module, 'weight', None)
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if any(matches(name, pattern) for name in names):
            continue
        nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
        hint = f'; the nearest layer is {nearest[0]!r}' if nearest else ''
        raise UserError(f'{WHERE}: the pattern {pattern!r} matches no layer of the model{hint}.')
