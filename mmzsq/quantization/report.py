# SPDX-License-Identifier: Apache-2.0
"""Report of a prepared model: bits, steps, size and operations of every layer, and why layers stayed float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor, nn

from mmzsq.quantization.attention import QuantMatmul
from mmzsq.quantization.modules import QuantizedLayer, input_scale, learned_log_scale, stored_input_scale
from mmzsq.quantization.quantizers import LSQ

FLOAT_BITS = 32
MEGABYTE = 10**6


@dataclass(frozen=True)
class LayerReport:
    """One layer with a weight, or one matrix product of two activations.

    A product is reported as a layer without weights: its left operand as the input, its right operand as the weight.

    Attributes:
        name: Name in the model.
        type: Name of the float class.
        role: ``'first'``, ``'last'``, ``'first, last'`` or ``''``.
        weights: Number of weights.
        w_bits: Bits of the weight, 32 if the layer stayed float.
        a_bits: Bits of the input, 32 if the layer stayed float.
        reason: Why the layer stayed float, or which setting decided its bits; ``''`` for a layer with ``w_bits`` and
            ``a_bits`` of the config.
        macs: Multiply-accumulate operations in the run, ``None`` if unknown.
    """

    name: str
    type: str
    role: str
    weights: int
    w_bits: int
    a_bits: int
    reason: str
    macs: int | None

    @property
    def quantized(self) -> bool:
        """Whether the layer was quantized."""
        return self.w_bits < FLOAT_BITS


class QuantizationReport:
    """All layers of a prepared model, its size and its bit operations.

    The model size counts quantized weights at their bits, steps and zero points at 32 bits, and all other parameters
    and floating point buffers in their own type. Bit operations (BOPs) are multiply-accumulates times weight bits times
    input bits, with 32 bits for float, summed over the listed layers for one call of ``run``. They grow with the image
    of that run, whose size everything that shows them names.

    Args:
        model: The prepared model. Its steps are read when needed.
        layers: Layers in the order of ``named_modules``, then attention, then other parameters.
        outputs: Name of the module that quantizes the output of a layer, by the name of the layer.
        float_values: Modules that made or read a value that should be quantized, but is returned by no module.
        image_size: Height and width in pixels of the image in the run, ``None`` if unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[LayerReport],
        outputs: Mapping[str, str] | None = None,
        float_values: Sequence[str] = (),
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.model: Any = model
        self.layers = layers
        self.outputs = dict(outputs or {})
        self.float_values = list(float_values)
        self.image_size = image_size

    @property
    def size_before(self) -> float:
        """Size of the float model in MB (10^6 bytes)."""
        return _float_bits(self.model) / 8 / MEGABYTE

    @property
    def size_after(self) -> float:
        """Size of the quantized model in MB (10^6 bytes)."""
        bits = _float_bits(self.model)
        for module in self.model.modules():
            if isinstance(module, QuantizedLayer):
                weight = module.weight
                bits -= weight.numel() * (8 * weight.element_size() - module.weight_quantizer.bits)
                scale = stored_input_scale(module)
                bits += 0 if scale is None else FLOAT_BITS * scale.numel()
            elif isinstance(module, LSQ):
                bits += _grid_bits(module)
        return bits / 8 / MEGABYTE

    @property
    def bops_before(self) -> int | None:
        """Bit operations of the float model in one run, ``None`` without a run."""
        if all(layer.macs is None for layer in self.layers):
            return None
        return sum((layer.macs or 0) * FLOAT_BITS**2 for layer in self.layers)

    @property
    def bops_after(self) -> int | None:
        """Bit operations of the quantized model in one run, ``None`` without a run."""
        if self.bops_before is None:
            return None
        return sum((layer.macs or 0) * layer.w_bits * layer.a_bits for layer in self.layers)

    @property
    def bops_name(self) -> str:
        """``'bit operations'``, with the size of the image if it is known."""
        if self.image_size is None:
            return 'bit operations'
        return f'bit operations of one {self.image_size[0]}x{self.image_size[1]} px image'

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types.

        Returns:
            ``model`` with sizes, BOPs and ``bops_image_size``, the height and width that they are for, and ``layers``,
            a list of dicts: the attributes of :class:`LayerReport` and, for quantized layers, ``weight`` and ``input``
            with ``scheme``, ``bits``, ``qmin``, ``qmax``, ``per_channel``, ``steps`` and ``zero_points`` (lists,
            ``None`` before calibration or where the scheme has none). ``input`` has ``factors`` and
            ``factors_learned`` if the layer divides its input channels by factors; ``output`` as ``weight`` where the
            output of the layer is quantized.
        """
        modules = dict(self.model.named_modules())
        layers = []
        for layer in self.layers:
            row = asdict(layer)
            if layer.quantized:
                row['weight'], row['input'] = map(_describe, _quantizers_of(modules[layer.name]))
                row['input'].update(_describe_factors(modules[layer.name]))
            if layer.name in self.outputs:
                row['output'] = _describe(cast(LSQ, modules[self.outputs[layer.name]].output_quantizer))
            layers.append(row)
        model: dict[str, Any] = {
            'size_before_mb': self.size_before,
            'size_after_mb': self.size_after,
            'bops_before': self.bops_before,
            'bops_after': self.bops_after,
            'bops_image_size': None if self.image_size is None else list(self.image_size),
        }
        if self.float_values:
            model['float_values'] = self.float_values
        return {'model': model, 'layers': layers}

    def float_parameters(self) -> str | None:
        """Return, as a phrase, the share of weights that stay float since no known layer owns them (``F.conv2d``).

        None if it is less than one percent.
        """
        others = [layer.weights for layer in self.layers if layer.type == 'Parameter']
        share = sum(others) / max(sum(layer.weights for layer in self.layers), 1)
        if share < 0.01:
            return None
        return f'{share:.0%} of the weights float, since no layer owns them'

    def summary(self) -> str:
        """Return one line: how many layers have which bits, what else stays float, and the size of the model."""
        layers = [layer for layer in self.layers if layer.type != 'Parameter']
        counts = Counter(f'W{layer.w_bits}A{layer.a_bits}' if layer.quantized else 'float' for layer in layers)
        bits = ', '.join(f'{count} {name}' for name, count in counts.most_common())
        others = f', {found}' if (found := self.float_parameters()) else ''
        return f'{len(layers)} layers ({bits}){others}, {self.size_before:.2f} MB -> {self.size_after:.2f} MB'

    def to_table(self) -> str:
        """Return the report as text: a header, one line per layer, and one or two lines about the model."""
        header = ('layer', 'type', 'weights', 'w', 'a', 'weight step', 'input step', 'zero', 'note')
        layers = self.to_dict()['layers']
        rows: list[tuple[str, ...]] = [header, *map(_row, layers)]
        if self.outputs:
            steps = [_format_range(row['output']['steps']) if 'output' in row else '-' for row in layers]
            cells = ('output step', *steps)
            rows = [(*row[:-1], cell, row[-1]) for row, cell in zip(rows, cells, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(f'model size: {self.size_before:.2f} MB -> {self.size_after:.2f} MB')
        if self.bops_before is not None and self.bops_after is not None:
            lines.append(f'{self.bops_name}: {self.bops_before / 1e9:.2f} G -> {self.bops_after / 1e9:.2f} G')
        if self.float_values:
            lines.append(f'float values near these modules: {", ".join(self.float_values)}')
        return '\n'.join(lines)


def _quantizers_of(module: nn.Module) -> tuple[LSQ, LSQ]:
    """Return the quantizers of weight and input, or of the right and left operand of a product."""
    if isinstance(module, QuantMatmul):
        return cast(LSQ, module.right_quantizer), cast(LSQ, module.left_quantizer)
    layer = cast(QuantizedLayer, module)
    return layer.weight_quantizer, layer.input_quantizer


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    factors = layer.get('input', {}).get('factors')
    shown = f'input factors {_format_range(factors)}' if factors else ''
    note = ', '.join(filter(None, (layer['role'], layer['reason'], shown)))
    name = (layer['name'], layer['type'], str(layer['weights']))
    if 'weight' not in layer:
        return (*name, 'fp', 'fp', '-', '-', '-', note)
    weight, source = layer['weight'], layer['input']
    return (
        *name,
        f'{weight["bits"]} {weight["scheme"]}' + (' per channel' if weight['per_channel'] else ''),
        f'{source["bits"]} {source["scheme"]}',
        _format_range(weight['steps']),
        _format_range(source['steps']),
        _format_range(source['zero_points']),
        note,
    )


def _format_range(values: list[float] | None) -> str:
    if values is None:
        return '-'
    low, high = min(values), max(values)
    return f'{low:.3g}' if low == high else f'{low:.3g}..{high:.3g}'


def _describe(quantizer: LSQ) -> dict[str, Any]:
    zero_point = quantizer.integer_zero_point
    return {
        'scheme': quantizer.scheme,
        'bits': quantizer.bits,
        'qmin': quantizer.qmin,
        'qmax': quantizer.qmax,
        'per_channel': quantizer.num_steps > 1,
        'steps': quantizer.step.tolist() if quantizer.ready else None,
        'zero_points': zero_point.tolist() if quantizer.ready and zero_point is not None else None,
    }


def _describe_factors(layer: nn.Module) -> dict[str, Any]:
    """Return the input factors of a layer and whether they are learned; nothing if it has none."""
    scale = input_scale(layer)
    if scale is None:
        return {}
    return {'factors': scale.tolist(), 'factors_learned': learned_log_scale(layer) is not None}


def _float_bits(model: nn.Module) -> int:
    """Bits of all parameters and floating point buffers of the float model, without quantizers and input scales."""
    tensors: set[Tensor | None] = set()
    for module in model.modules():
        if not isinstance(module, LSQ):
            tensors.update(module.parameters(recurse=False), module.buffers(recurse=False))
            # The float layer has no input scale.
            tensors -= {stored_input_scale(module)}
    return sum(t.numel() * t.element_size() * 8 for t in tensors if t is not None and t.is_floating_point())


def _grid_bits(quantizer: LSQ) -> int:
    return FLOAT_BITS * quantizer.num_steps * (1 if quantizer.zero_point is None else 2)
