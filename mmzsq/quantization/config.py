# SPDX-License-Identifier: Apache-2.0
"""What to quantize and how: the ``zsq.quantizer`` section of a config, checked and typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from mmzsq.errors import UserError, check_keys
from mmzsq.quantization.quantizers import INITS, LSQ, SCHEMES, STEPS, check_bits, check_choice
from mmzsq.registry import QUANTIZERS, SCOPE

WHERE = 'zsq.quantizer'
SAME = 'same'
BUDGETS = ('size', 'operations')

QuantizerClass = type[LSQ]
Section = TypeVar('Section', 'WeightSettings', 'ActivationSettings', 'AllocationSettings')
SomeBits = TypeVar('SomeBits', 'Bits', 'AttentionBits')


class Bits(NamedTuple):
    """Bits of a layer's weight and input."""

    w_bits: int
    a_bits: int


class AttentionBits(NamedTuple):
    """Bits of what attention multiplies.

    Attributes:
        operand_bits: Of queries, keys and values.
        probability_bits: Of the softmax output.
    """

    operand_bits: int
    probability_bits: int


@dataclass(frozen=True)
class WeightSettings:
    """How weights are quantized.

    Attributes:
        scheme: ``'signed'``, the only one: an offset of weights costs integer hardware a sum over
            every input.
        per_channel: One step for each output channel instead of one for all.
        init: ``'mse'`` or ``'lsq'``, see :class:`~mmzsq.quantization.LSQ`.
        narrow: Leave out -2^(b-1), so that a BN with negative gamma folds into the same integer
            type. ``None``: only at 8 bits, where it costs nothing; fewer bits have room for the
            flipped value in int8.
    """

    scheme: str = 'signed'
    per_channel: bool = True
    init: str = 'mse'
    narrow: bool | None = None


@dataclass(frozen=True)
class ActivationSettings:
    """How the inputs of layers are quantized, one step for each tensor.

    Attributes:
        scheme: ``'offset'``, ``'signed'`` or ``'unsigned'``, see :class:`~mmzsq.quantization.LSQ`.
        init: ``'mse'`` or ``'lsq'``.
    """

    scheme: str = 'offset'
    init: str = 'mse'


@dataclass(frozen=True)
class AllocationSettings:
    """How each layer gets bits of its own, from its sensitivity: see :mod:`mmzsq.quantization.allocation`.

    Attributes:
        budget: What is not to be more than with ``w_bits`` and ``a_bits`` in every layer: ``'size'`` of the weights,
            which get the bits while inputs keep theirs, or bit ``'operations'``, with as many bits for a layer's weight
            as for its input.
        candidates: Bits to choose from.
        batches: Of synthetic images, that sensitivities are measured on.
    """

    budget: str = 'size'
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 8)
    batches: int = 2


@dataclass(frozen=True)
class QuantizationConfig:
    """What to quantize and how.

    The defaults are the best recipe measured. To repeat the paper to the letter:
    ``weight=dict(per_channel=False, init='lsq', narrow=False), activation=dict(scheme='signed',
    init='lsq'), step='linear', first_bits=None, last_bits=None``.

    A layer's bits are decided in this order: ``scope``, then ``skip``, then ``overrides``, then
    ``first_bits`` and ``last_bits``, then ``w_bits`` and ``a_bits``. Patterns are those of
    :mod:`mmzsq.module_patterns`; each applies to all layers inside the modules that it selects.

    Attributes:
        type: Registered quantizer, ``'mmzsq.LSQ'`` or ``'mmzsq.LSQPlus'``.
        w_bits: Of weights, 2 to 8.
        a_bits: Of the inputs of layers, 2 to 8.
        weight: See :class:`WeightSettings`.
        activation: See :class:`ActivationSettings`.
        step: ``'log'`` or ``'linear'``, what is learnt of a step.
        grad_scale: Scale step gradients by 1 / sqrt(n * qmax).
        first_bits: Weight and input bits of layers that see the model's input; ``None`` keeps them
            float, ``'same'`` treats them as any other layer.
        last_bits: The same for layers that make the model's output.
        equalize: Divide each channel of a layer's input, and multiply the weights that it meets, by a factor found at
            initialization, so that channels of unlike ranges share a step better: see
            :mod:`mmzsq.quantization.equalize`. Of layers with an input or a weight below 8 bits.
        scope: Pattern or patterns of what is quantized, such as ``'backbone'``; all else stays
            float. ``None`` is the whole model.
        attention: Bits of the operands of both matrix products of attention, one number for all,
            ``dict(operand_bits=.., probability_bits=..)``, or ``None`` for float. Softmax output is
            unsigned, queries, keys and values have the scheme of ``activation``.
        skip: Patterns of layers that stay float.
        overrides: Pattern to bits of weight and input: one number for both, ``dict(w_bits=..,
            a_bits=..)``, or ``None`` for float. Of several that match, the last one counts.
        allocate: How layers whose bits nothing else decides get bits of their own before training; ``None``: they all
            have ``w_bits`` and ``a_bits``.
    """

    type: str = 'mmzsq.LSQ'
    w_bits: int = 8
    a_bits: int = 8
    weight: WeightSettings = field(default_factory=WeightSettings)
    activation: ActivationSettings = field(default_factory=ActivationSettings)
    step: str = 'log'
    grad_scale: bool = True
    first_bits: int | str | None = 8
    last_bits: int | str | None = 8
    equalize: bool = False
    scope: Sequence[str] | None = None
    attention: AttentionBits | None = None
    skip: Sequence[str] = ()
    overrides: Mapping[str, Bits | None] = field(default_factory=dict)
    allocate: AllocationSettings | None = None

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> QuantizationConfig:
        """Read the ``zsq.quantizer`` section.

        Args:
            cfg: Keys are the attributes of this class; ``weight`` and ``activation`` are dicts of
                theirs.

        Returns:
            The checked configuration.

        Raises:
            UserError: If a key is unknown or a value is not allowed.
        """
        check_keys(cfg, [f.name for f in fields(cls)], WHERE)
        values = dict(cfg)
        values['weight'] = _section(WeightSettings, cfg.get('weight', {}), 'weight')
        values['activation'] = _section(ActivationSettings, cfg.get('activation', {}), 'activation')
        values['scope'] = _scope(cfg.get('scope'))
        values['attention'] = _bits(AttentionBits, f'{WHERE}.attention', cfg.get('attention'))
        values['skip'] = _patterns('skip', cfg.get('skip', ()))
        overrides = cfg.get('overrides', {})
        if not isinstance(overrides, Mapping):
            raise UserError(f'{WHERE}.overrides is {overrides!r}, but must be a dict of pattern to bits.')
        values['overrides'] = {p: _bits(Bits, f'{WHERE}.overrides[{p!r}]', bits) for p, bits in overrides.items()}
        if cfg.get('allocate') is not None:
            values['allocate'] = _section(AllocationSettings, cfg['allocate'], 'allocate')
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        check_bits(f'{WHERE}.w_bits', self.w_bits)
        check_bits(f'{WHERE}.a_bits', self.a_bits)
        check_choice(f'{WHERE}.weight.scheme', self.weight.scheme, ('signed',))
        check_choice(f'{WHERE}.weight.init', self.weight.init, INITS)
        check_choice(f'{WHERE}.activation.scheme', self.activation.scheme, SCHEMES)
        check_choice(f'{WHERE}.activation.init', self.activation.init, INITS)
        check_choice(f'{WHERE}.step', self.step, STEPS)
        _check_bool(f'{WHERE}.grad_scale', self.grad_scale)
        _check_bool(f'{WHERE}.equalize', self.equalize)
        _check_bool(f'{WHERE}.weight.per_channel', self.weight.per_channel)
        if self.weight.narrow is not None:
            _check_bool(f'{WHERE}.weight.narrow', self.weight.narrow)
        for key, bits in (('first_bits', self.first_bits), ('last_bits', self.last_bits)):
            if bits is not None and bits != SAME:
                check_bits(f'{WHERE}.{key} (2 to 8, None for float, or {SAME!r})', bits)
        if self.allocate is not None:
            where = f'{WHERE}.allocate'
            check_choice(f'{where}.budget', self.allocate.budget, BUDGETS)
            if not isinstance(self.allocate.candidates, (list, tuple)) or not self.allocate.candidates:
                raise UserError(
                    f'{where}.candidates is {self.allocate.candidates!r}, but must be a list of bits, of one at least.'
                )
            for bits in self.allocate.candidates:
                check_bits(f'{where}.candidates', bits)
            if not isinstance(self.allocate.batches, int) or self.allocate.batches < 1:
                raise UserError(
                    f'{where}.batches is {self.allocate.batches!r}, but must be a whole number of at least 1.'
                )
        if self.quantizer_class.learns_zero_point and self.activation.scheme != 'offset':
            raise UserError(
                f'{WHERE}.type {self.type!r} learns a zero point, so {WHERE}.activation.scheme '
                f"must be 'offset', not {self.activation.scheme!r}."
            )

    def integers(self) -> dict[str, Any]:
        """All that decides which integers stand for what, by name: without where steps begin and how they learn."""
        of_parts = {
            f'{name}.{key}': value
            for name in ('weight', 'activation')
            for key, value in vars(getattr(self, name)).items()
            if key != 'init'
        }
        left_out = ('weight', 'activation', 'grad_scale', 'allocate')
        return {**{f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}, **of_parts}

    @property
    def quantizer_class(self) -> QuantizerClass:
        """The class that ``type`` names.

        Raises:
            UserError: If no quantizer of that name is registered.
        """
        name = str(self.type).removeprefix(f'{SCOPE}.')
        found = QUANTIZERS.module_dict.get(name)
        if found is None:
            known = ', '.join(repr(f'{SCOPE}.{key}') for key in sorted(QUANTIZERS.module_dict))
            raise UserError(f'{WHERE}.type is {self.type!r}, but must be one of {known}.')
        return found

    @property
    def needs_roles(self) -> bool:
        """Whether first or last layers are treated unlike the others."""
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
            scheme: If another than that of ``activation``.
        """
        return self.quantizer_class(
            bits=bits,
            scheme=scheme or self.activation.scheme,
            init=self.activation.init,
            step=self.step,
            grad_scale=self.grad_scale,
        )

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


def _section(cls: type[Section], cfg: Any, key: str) -> Section:
    if not isinstance(cfg, Mapping):
        raise UserError(f'{WHERE}.{key} is {cfg!r}, but must be a dict.')
    check_keys(cfg, [f.name for f in fields(cls)], f'{WHERE}.{key}')
    return cls(**cfg)


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(p, str) for p in value):
        raise UserError(f'{WHERE}.{key} is {value!r}, but must be a list of patterns.')
    return tuple(value)


def _scope(value: Any) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None if value is None else (value,)
    return _patterns('scope', value)


def _bits(cls: type[SomeBits], where: str, value: Any) -> SomeBits | None:
    """Bits by name, or one number for all; ``None`` stays ``None``."""
    if value is None:
        return None
    names = cls._fields
    if isinstance(value, Mapping):
        check_keys(value, names, where)
        missing = [name for name in names if name not in value]
        if missing:
            raise UserError(f'{where} lacks {" and ".join(missing)}.')
    else:
        value = dict.fromkeys(names, value)
    for name in names:
        check_bits(f'{where} {name}', value[name])
    return cls(**value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f'{name} is {value!r}, but must be True or False.')
