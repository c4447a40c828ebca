# SPDX-License-Identifier: Apache-2.0
"""Turn a float model into one that simulates integers: swap its layers and attach quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.module_patterns import enclosing_names, enclosing_patterns, nearest_hint
from mmzsq.quantization.attention import (
    QuantizedAttention,
    QuantMatmul,
    is_attention,
    make_quantized_attention,
    quantized_attention_class,
)
from mmzsq.quantization.config import WHERE, AttentionBits, Bits, QuantizationConfig
from mmzsq.quantization.equalize import add_input_scale, is_depthwise, remove_input_scale
from mmzsq.quantization.modules import (
    QuantizedLayer,
    make_quantized,
    quantizable_bases,
    quantized_class,
    quantized_layers,
    weight_of,
)
from mmzsq.quantization.multihead_attention import decompose_attention
from mmzsq.quantization.outputs import Grids, add_grids, choose_grids, watching
from mmzsq.quantization.report import FLOAT_BITS, LayerReport, QuantizationReport
from mmzsq.quantization.trace import Trace, trace

NOT_RUN = 'did not run'


class _Attention(NamedTuple):
    """An attention module with the bits decided for it; ``bits`` are ``None`` for float."""

    name: str
    module: nn.Module
    type: str
    bits: AttentionBits | None
    reason: str


class _Settings(NamedTuple):
    """Everything that decides the bits of a model's layers.

    Attributes:
        config: The quantizer settings.
        patterns: For each module name, the patterns of ``config`` that select the module or one around it.
        trace: Result of the run; empty without a run.
        has_run: Whether the model was run.
    """

    config: QuantizationConfig
    patterns: Mapping[str, frozenset[str]]
    trace: Trace
    has_run: bool


def prepare(
    model: nn.Module,
    config: QuantizationConfig,
    run: Callable[[], Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> QuantizationReport:
    """Replace the layers of a model by quantized ones, in place.

    This works on any eager model: layers are replaced by their class, and no graph is traced or rewritten. The
    quantizers still need initial steps, see :func:`mmzsq.quantization.calibrating`.

    Args:
        model: A float model. It keeps its device and the train or eval mode of each module.
        config: Which layers to quantize, and how.
        run: Runs ``model`` on one input, preferably a small one, and returns its raw outputs. It is called once, in
            eval mode, to find the first and last layers and to count operations. It may be ``None`` if
            ``config.first_bits`` and ``config.last_bits`` are ``'same'``; then no operations are reported.
        image_size: Height and width in pixels of the image that ``run`` takes, for the report.

    Returns:
        A report of every layer that has a weight and, if ``config.attention`` is set, of the matrix products of
        attention.

    Raises:
        UserError: If no layer can be quantized, attention is to be quantized and none can be, a pattern selects no
            layer, the model is already prepared, or the first and last layers are needed and cannot be found.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> config = QuantizationConfig(w_bits=4, a_bits=4, first_bits='same', last_bits='same', skip=['2'])
        >>> [(layer.name, layer.w_bits, layer.reason) for layer in prepare(model, config).layers]
        [('0', 4, ''), ('2', 32, "skip '2'")]
    """
    decompose_attention(model)
    layers = {name: module for name, module in model.named_modules() if _has_weight_matrix(module)}
    if any(isinstance(layer, QuantizedLayer) for layer in layers.values()):
        raise UserError('The model has quantized layers already; `prepare` takes a float model.')
    patterns = enclosing_patterns(model, config.patterns)
    _check_patterns(model, config.patterns, {name: patterns[name] for name in layers})
    if run is None and config.adds_grids:
        raise UserError(f'{WHERE}.outputs and {WHERE}.target need a run of the model: pass `run` to `prepare`.')
    if run is None and config.needs_roles:
        raise UserError(
            'First and last layers are found by running the model: pass `run` to `prepare`, or set '
            f"{WHERE}.first_bits and {WHERE}.last_bits to 'same'."
        )
    traceable: dict[str, nn.Module] = {
        n: m
        for n, m in layers.items()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) or quantized_class(m) is not None
    }
    attention = [] if config.attention is None else _swap_attention(model, config, patterns)
    products = {n: m for n, m in model.named_modules() if isinstance(m, QuantMatmul)}
    called = {**traceable, **products}
    with watching(model, called) if config.adds_grids else nullcontext() as flow:
        result = Trace() if run is None else trace(model, called, run)

    settings = _Settings(config, patterns, result, run is not None)
    rows = [_quantize_layer(name, layer, settings) for name, layer in layers.items()]
    if not any(row.quantized for row in rows):
        reasons = sorted({row.reason for row in rows})
        raise UserError(f'No layer of the model was quantized: {"; ".join(reasons) or "it has no weights"}.')
    for found in attention:
        rows += _quantize_attention(found, settings)
    grids = Grids()
    if flow is not None:
        grids = choose_grids(flow, dict(quantized_layers(model)), result.last, config)
        add_grids(model, grids, config)
    rows += _other_parameters(model, layers.values())
    return QuantizationReport(model, rows, grids.layer_of, grids.float_values, image_size)


def set_bits(layer: QuantizedLayer, config: QuantizationConfig, bits: Bits) -> None:
    """Give a quantized layer new quantizers and, if ``config.equalize`` applies to it, an input scale.

    Args:
        layer: Quantized layer. Quantizers and input scale that it already has are replaced.
        config: Settings of the quantizers.
        bits: Bits of weight and input.
    """
    remove_input_scale(layer)
    layer.add_quantizers(
        config.weight_quantizer(bits.w_bits, len(layer.filters())), config.input_quantizer(bits.a_bits)
    )
    factors = config.input_factors(bits, is_depthwise(layer))
    if factors:
        add_input_scale(layer, learned=factors == 'learned')


def _quantize_layer(name: str, layer: nn.Module, settings: _Settings) -> LayerReport:
    """Quantize one layer in place, or leave it float, and report which."""
    float_class, traced = type(layer), settings.trace
    roles = [role for role, names in (('first', traced.first), ('last', traced.last)) if name in names]
    cls, bits, reason = _choose_class_and_bits(name, layer, roles, settings)
    if cls is not None and bits is not None:
        set_bits(make_quantized(layer, cls), settings.config, bits)
    return LayerReport(
        name=name,
        type=float_class.__name__,
        role=', '.join(roles),
        weights=weight_of(layer).numel(),
        w_bits=bits.w_bits if bits else FLOAT_BITS,
        a_bits=bits.a_bits if bits else FLOAT_BITS,
        reason=reason,
        macs=traced.macs.get(name, 0) if settings.has_run else None,
    )


def _choose_class_and_bits(
    name: str, layer: nn.Module, roles: Sequence[str], settings: _Settings
) -> tuple[type[QuantizedLayer] | None, Bits | None, str]:
    """Return the quantized class and the bits of a layer, both ``None`` for float, and the reason."""
    cls = quantized_class(layer)
    if cls is None:
        bases = quantizable_bases(layer)
        kind = f'a {bases[0]} that may compute something else, ' if bases else ''
        return None, None, f'{kind}no quantized class is registered for {type(layer).__name__}'
    if settings.has_run and name not in settings.trace.macs:
        return None, None, f'{NOT_RUN}: unused, or its weight is read without calling it'
    bits, reason = settings.config.bits_of(settings.patterns[name], roles)
    return cls if bits else None, bits, reason


def _swap_attention(
    model: nn.Module, config: QuantizationConfig, patterns: Mapping[str, frozenset[str]]
) -> list[_Attention]:
    """Replace attention modules by adapters whose products are modules, still float, so that the run sees them."""
    found = []
    for name, module in list(model.named_modules()):
        if is_attention(module):
            cls = quantized_attention_class(module)
            bits, reason = config.attention_bits_of(patterns[name])
            if cls is None:
                bits, reason = None, f'no adapter is registered for {type(module).__name__}'
            found.append(_Attention(name, module, type(module).__name__, bits, reason))
            if cls is not None and bits is not None:
                make_quantized_attention(module, cls)
    if not any(attention.bits for attention in found):
        reasons = sorted({attention.reason for attention in found})
        raise UserError(
            f'{WHERE}.attention is set, but no attention of the model can be quantized: '
            f'{"; ".join(reasons) or "no attention module is known in it"}. Set it to None.'
        )
    return found


def _quantize_attention(attention: _Attention, settings: _Settings) -> list[LayerReport]:
    """Add quantizers to the products of one attention module, or leave them float, and report which."""
    config, traced, has_run = settings.config, settings.trace, settings.has_run
    bits, reason = attention.bits, attention.reason
    names = [f'{attention.name}.query_key', f'{attention.name}.probability_value']
    if has_run and bits and names[0] not in traced.macs:
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
        LayerReport(name, 'matmul', '', 0, operand, a_bits, reason, traced.macs[name] if has_run else None)
        for name, a_bits in zip(names, (operand, probability), strict=True)
    ]


def _other_parameters(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[LayerReport]:
    """Report parameters of two or more dimensions that are no layer's weight, such as queries and position biases."""
    listed = {weight_of(layer).untyped_storage().data_ptr() for layer in layers}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.untyped_storage().data_ptr() not in listed:
            reason = 'a parameter that is not the weight of a known layer'
            yield LayerReport(name, 'Parameter', '', parameter.numel(), FLOAT_BITS, FLOAT_BITS, reason, None)


def _has_weight_matrix(module: nn.Module) -> bool:
    """Return whether a module itself holds a weight of two or more dimensions."""
    weight = getattr(module, 'weight', None)
    return isinstance(weight, Tensor) and weight.dim() >= 2


def _check_patterns(model: nn.Module, patterns: Iterable[str], patterns_of: Mapping[str, frozenset[str]]) -> None:
    """Raise :class:`UserError` for the first pattern that selects no layer; ``patterns_of`` has the layers as keys."""
    for pattern in patterns:
        if any(pattern in found for found in patterns_of.values()):
            continue
        names = {outer for name in patterns_of for outer in enclosing_names(name)}
        selectable = {name: module for name, module in model.named_modules() if name in names}
        hint = nearest_hint(selectable, pattern)
        raise UserError(f'{WHERE}: the pattern {pattern!r} matches no layer of the model{hint}. Correct or remove it.')
