# SPDX-License-Identifier: Apache-2.0
"""The section ``zsq.quantizer``: selection of layers, bits and quantizers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from typing_extensions import Self

from mmzsq.quantization.quantizers import LSQ
from mmzsq.registry import QUANTIZERS, SCOPE
from mmzsq.typed_section import FromList, Meaning, Positive, TypedSection, failure

WHERE = 'zsq.quantizer'
SAME = 'same'

QuantizerClass = type[LSQ]


class Bits(NamedTuple):
    """Bits of a layer's weight and input."""

    w_bits: int
    a_bits: int


class AttentionBits(NamedTuple):
    """Bits of the operands of attention's matrix products.

    Attributes:
        operand_bits: Bits of queries, keys and values.
        probability_bits: Bits of the softmax output.
    """

    operand_bits: int
    probability_bits: int


NumBits = Annotated[int, Field(ge=2, le=8)]


class _LayerBits(TypedSection):
    w_bits: NumBits
    a_bits: NumBits


class _OperandBits(TypedSection):
    operand_bits: NumBits
    probability_bits: NumBits


def _as_dict(value: Any) -> Any:
    return value._asdict() if isinstance(value, (Bits, AttentionBits)) else value


def _to_bits(value: int | _LayerBits) -> Bits:
    return Bits(value, value) if isinstance(value, int) else Bits(value.w_bits, value.a_bits)


def _to_attention_bits(value: int | _OperandBits) -> AttentionBits:
    if isinstance(value, int):
        return AttentionBits(value, value)
    return AttentionBits(value.operand_bits, value.probability_bits)


if TYPE_CHECKING:
    LayerBits: TypeAlias = Bits
    OperandBits: TypeAlias = AttentionBits
else:
    LayerBits = Annotated[
        NumBits | _LayerBits,
        BeforeValidator(_as_dict),
        AfterValidator(_to_bits),
        Meaning('an integer from 2 to 8, a dict of w_bits and a_bits'),
    ]
    OperandBits = Annotated[
        NumBits | _OperandBits,
        BeforeValidator(_as_dict),
        AfterValidator(_to_attention_bits),
        Meaning('an integer from 2 to 8, a dict of operand_bits and probability_bits'),
    ]

Patterns = Annotated[
    tuple[str, ...],
    FromList,
    Meaning('a list of module patterns'),
]
Scope = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    FromList,
    Meaning('a module pattern, a list of module patterns'),
]
Candidates = Annotated[
    tuple[NumBits, ...],
    Field(min_length=1),
    FromList,
    Meaning('a list of integers from 2 to 8'),
]


class WeightSettings(TypedSection):
    """Quantization of weights."""

    scheme: Literal['signed'] = 'signed'
    """Integer grid. An offset of weights would cost integer hardware a sum over every input."""
    per_channel: bool = True
    """One step for each output channel instead of one for the tensor."""
    init: Literal['mse', 'lsq'] = 'mse'
    """Initial steps: those of the least squared error, or LSQ's ``2 * mean(|w|) / sqrt(qmax)``."""
    narrow: bool | None = None
    """Leave out -2^(b-1), so that BatchNorm with a negative gamma folds into the same integer type. None: at 8 bits
    only. Fewer bits have room for the flipped value in int8."""


class ActivationSettings(TypedSection):
    """Quantization of the inputs of layers, with one step for each tensor."""

    scheme: Literal['offset', 'signed', 'unsigned'] = 'offset'
    """Integer grid: with a zero point, symmetric, or from zero up."""
    init: Literal['mse', 'lsq'] = 'mse'
    """Initial steps: those of the least squared error, or LSQ's."""


class AllocationSettings(TypedSection):
    """Choice of the bits of each layer by its sensitivity; see :mod:`mmzsq.quantization.allocation`."""

    budget: Literal['size', 'operations'] = 'size'
    """Limit that the allocation keeps: the size of the weights, or the bit operations, of ``w_bits`` and ``a_bits`` in
    every layer. With ``'size'``, inputs keep their bits. With ``'operations'``, weight and input get the same bits."""
    candidates: Candidates = (2, 3, 4, 5, 6, 8)
    """Bits to choose from."""
    batches: Positive = 2
    """Batches of synthetic images to measure sensitivities on."""


class QuantizationConfig(TypedSection):
    """Selection of layers, bits and quantizers.

    The defaults are the best recipe measured. The paper's settings are ``weight=dict(per_channel=False, init='lsq',
    narrow=False), activation=dict(scheme='signed', init='lsq'), step='linear', first_bits=None, last_bits=None``.

    These settings decide the bits of a layer, in this order: ``scope``, ``skip``, ``overrides``, ``first_bits`` and
    ``last_bits``, then ``w_bits`` and ``a_bits``. A pattern (:mod:`mmzsq.module_patterns`) selects modules, and with a
    module all layers in it.
    """

    type: str = 'mmzsq.LSQ'
    """Registered quantizer: ``'mmzsq.LSQ'`` or ``'mmzsq.LSQPlus'``."""
    w_bits: NumBits = 8
    """Bits of weights."""
    a_bits: NumBits = 8
    """Bits of the inputs of layers."""
    weight: WeightSettings = WeightSettings()
    """Quantization of weights."""
    activation: ActivationSettings = ActivationSettings()
    """Quantization of the inputs of layers."""
    step: Literal['log', 'linear'] = 'log'
    """Whether training learns the logarithm of a step or the step itself."""
    grad_scale: bool = True
    """Scale the gradients of steps by 1 / sqrt(n * qmax), as LSQ does."""
    first_bits: NumBits | Literal['same'] | None = 8
    """Bits of the layers that read the model's input. ``'same'``: as any other layer. None: they stay float."""
    last_bits: NumBits | Literal['same'] | None = 8
    """Bits of the layers that compute the model's output. ``'same'``: as any other layer. None: they stay float."""
    equalize: bool | Literal['depthwise', 'learned'] = 'depthwise'
    """Divide each input channel of a layer by a factor and multiply its weights by it. Channels of different
    ranges then share a step better; see :mod:`mmzsq.quantization.equalize`. ``'depthwise'``: depthwise convolutions of
    any bits, with factors that training learns, unless ``outputs`` or ``target`` puts grids on values between layers.
    ``'learned'``: such factors in all layers. True: factors that stay as initialized, in layers with an input or a
    weight below 8 bits."""
    scope: Scope | None = None
    """Modules to quantize, such as ``'backbone'``. All others stay float. None: the whole model."""
    attention: OperandBits | None = None
    """Bits of the operands of attention's two matrix products. The softmax output is unsigned, queries, keys and values
    have the scheme of ``activation``. None: the products stay float."""
    outputs: NumBits | None = None
    """Bits of trained grids on values between layers: the output of each layer after its BatchNorm, the output of its
    activation function, and sums. ONNX Runtime needs 8; see :mod:`mmzsq.quantization.outputs`. None: no grid."""
    target: Literal['openvino', 'onnxruntime', 'tensorrt'] | None = None
    """Runtime to train for. ``'onnxruntime'``: ``outputs`` is 8 if it is None. ``'tensorrt'``: inputs of 8 bits are
    symmetric whatever ``activation.scheme`` says, and shortcuts are quantized before they are added. None and
    ``'openvino'``: no other grids than those of inputs and weights."""
    skip: Patterns = ()
    """Layers that stay float."""
    overrides: dict[str, LayerBits | None] = {}
    """Pattern to bits of weight and input. None keeps the layers float. The last pattern that matches counts."""
    allocate: AllocationSettings | None = None
    """Give each layer bits by its sensitivity before training. None: all have ``w_bits`` and ``a_bits``."""

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> QuantizationConfig:
        """Read the section ``zsq.quantizer``.

        Raises:
            UserError: If a key is unknown or a value is not allowed.
        """
        return cls.parse(cfg, WHERE)

    @field_validator('type')
    @classmethod
    def _check_type(cls, name: str) -> str:
        if name.removeprefix(f'{SCOPE}.') not in QUANTIZERS.module_dict:
            known = ', '.join(repr(f'{SCOPE}.{key}') for key in sorted(QUANTIZERS.module_dict))
            raise failure(f'{{where}} is {name!r}, but must be one of {known}.')
        return name

    @model_validator(mode='after')
    def _check_scheme(self) -> Self:
        if self.quantizer_class.learns_zero_point and self.activation.scheme != 'offset':
            raise failure(
                f'{{where}}.type {self.type!r} learns a zero point, so {{where}}.activation.scheme must be '
                f"'offset', not {self.activation.scheme!r}."
            )
        return self

    @model_validator(mode='after')
    def _check_outputs(self) -> Self:
        if self.target == 'tensorrt' and self.outputs is not None:
            raise failure(
                "{where}.outputs is for ONNX Runtime, but {where}.target is 'tensorrt', which needs no grids on the "
                'outputs of layers: set one of them to None.'
            )
        if self.adds_grids and self.allocate is not None:
            raise failure(
                '{where}.allocate gives layers bits of their own, but {where}.outputs and {where}.target share grids '
                'among layers: set {where}.overrides instead, or leave {where}.allocate at None.'
            )
        return self

    def integers(self) -> dict[str, Any]:
        """Return all settings that decide what each integer means, by name.

        Left out: how steps are initialized and learned, and ``equalize``, since the names in a checkpoint tell which
        layers have factors.
        """
        parts = {
            f'{name}.{key}': getattr(getattr(self, name), key)
            for name in ('weight', 'activation')
            for key in type(getattr(self, name)).model_fields
            if key != 'init'
        }
        left_out = ('weight', 'activation', 'grad_scale', 'equalize', 'allocate', 'outputs', 'target')
        kept = {key: getattr(self, key) for key in type(self).model_fields if key not in left_out}
        target = self.target if self.target == 'tensorrt' else None
        return {**kept, 'outputs': self.output_bits, 'target': target, **parts}

    @property
    def output_bits(self) -> int | None:
        """Bits of the grids on outputs of layers, activation functions and sums; None if there are none."""
        return 8 if self.outputs is None and self.target == 'onnxruntime' else self.outputs

    @property
    def adds_grids(self) -> bool:
        """Whether values between layers get grids."""
        return self.output_bits is not None or self.target == 'tensorrt'

    @property
    def value_bits(self) -> int:
        """Bits of the grids on values between layers."""
        return 8 if self.output_bits is None else self.output_bits

    @property
    def quantizer_class(self) -> QuantizerClass:
        """The class that ``type`` names."""
        return QUANTIZERS.module_dict[self.type.removeprefix(f'{SCOPE}.')]

    @property
    def needs_roles(self) -> bool:
        """Whether first or last layers are treated differently from the others."""
        return not self.first_bits == self.last_bits == SAME

    @property
    def patterns(self) -> list[str]:
        """All patterns; each should name something in the model."""
        return [*(self.scope or ()), *self.skip, *self.overrides]

    def weight_quantizer(self, bits: int, out_channels: int) -> LSQ:
        """A new quantizer for the weight of one layer.

        Args:
            bits: 2 to 8.
            out_channels: First dimension of the layer's filters.
        """
        narrow = self.weight.narrow
        return self.quantizer_class(
            bits=bits,
            scheme=self.weight.scheme,
            num_steps=out_channels if self.weight.per_channel else 1,
            init=self.weight.init,
            step=self.step,
            grad_scale=self.grad_scale,
            narrow=bits == 8 if narrow is None else narrow,
        )

    def input_quantizer(self, bits: int, scheme: str | None = None) -> LSQ:
        """A new quantizer for the input of one layer.

        Args:
            bits: 2 to 8.
            scheme: If another than that of ``activation``. For TensorRT, 8 bits are always signed: its type is int8
                with zero point 0.
        """
        scheme = scheme or self.activation.scheme
        return self.quantizer_class(
            bits=bits,
            scheme='signed' if self.target == 'tensorrt' and bits == 8 else scheme,
            init=self.activation.init,
            step=self.step,
            grad_scale=self.grad_scale,
        )

    def input_factors(self, bits: Bits, depthwise: bool) -> Literal['fixed', 'learned'] | None:
        """Decide whether a layer divides its input channels by factors.

        Args:
            bits: Bits of the layer.
            depthwise: Whether it is a depthwise convolution.

        Returns:
            The kind of factors, or None for none.
        """
        if self.equalize is True:
            return 'fixed' if min(bits) < 8 else None
        # With a grid before the division, values would be rounded twice.
        every = self.equalize == 'learned'
        return 'learned' if every or (self.equalize and depthwise and not self.adds_grids) else None

    def bits_of(self, patterns: Collection[str], roles: Sequence[str]) -> tuple[Bits | None, str]:
        """Decide the bits of one layer.

        Args:
            patterns: Those of :attr:`patterns` that select the layer or a module around it.
            roles: ``'first'``, ``'last'``, both or none.

        Returns:
            Its bits, ``None`` for float, and the reason: the setting that decided, or ``''`` for an
            ordinary layer.
        """
        bits, reason = self._bits_by_pattern(patterns)
        if reason:
            return bits, reason
        by_role = {'first': self.first_bits, 'last': self.last_bits}
        for role in roles:
            role_bits = by_role[role]
            if role_bits is None:
                return None, f'{role} layer'
            if isinstance(role_bits, int):
                return Bits(role_bits, role_bits), f'{role} layer'
        return Bits(self.w_bits, self.a_bits), ''

    def attention_bits_of(self, patterns: Collection[str]) -> tuple[AttentionBits | None, str]:
        """Decide the bits of one attention module, if any is quantized.

        Args:
            patterns: Those of :attr:`patterns` that select the module or one around it.

        Returns:
            Its bits, ``None`` for float, and the reason, as of :meth:`bits_of`; an override's
            ``a_bits`` count.
        """
        bits, reason = self._bits_by_pattern(patterns)
        if reason:
            return (AttentionBits(bits.a_bits, bits.a_bits) if bits else None), reason
        return self.attention, ''

    def _bits_by_pattern(self, patterns: Collection[str]) -> tuple[Bits | None, str]:
        """Bits and reason where a pattern decides; else the reason is empty."""
        if self.scope is not None and not any(pattern in patterns for pattern in self.scope):
            return None, f'outside scope {", ".join(map(repr, self.scope))}'
        for pattern in self.skip:
            if pattern in patterns:
                return None, f'skip {pattern!r}'
        for pattern, bits in reversed(list(self.overrides.items())):
            if pattern in patterns:
                return bits, f'overrides {pattern!r}'
        return None, ''
