# SPDX-License-Identifier: Apache-2.0
"""The ``zsq.quantizer`` section: accepted values, and error messages."""

from __future__ import annotations

from typing import Any

import pytest

from mmzsq.errors import UserError
from mmzsq.quantization import LSQ, LSQPlus, QuantizationConfig


def test_defaults_are_the_measured_recipe() -> None:
    """Weights signed per channel, inputs with an offset, MSE, log steps, 8-bit ends."""
    config = QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4))
    weight, source = config.weight_quantizer(4, 16), config.input_quantizer(4)
    assert type(weight) is LSQ
    assert (weight.scheme, weight.num_steps, weight.qmin, weight.qmax) == ('signed', 16, -8, 7)
    assert (source.scheme, source.num_steps, source.qmin, source.qmax) == ('offset', 1, 0, 15)
    assert weight.init == source.init == 'mse'
    assert [name for name, _ in weight.named_parameters()] == ['log_step']
    assert config.bits_of((), ['first'])[0] == (8, 8)


def test_eight_bit_weights_are_narrow_by_default() -> None:
    """Then a BN with negative gamma folds in int8."""
    for narrow, qmin in [(None, -127), (True, -127), (False, -128)]:
        config = QuantizationConfig.from_dict(dict(weight=dict(narrow=narrow)))
        assert config.weight_quantizer(8, 1).qmin == qmin


def test_the_paper_from_config() -> None:
    """Per tensor, signed, linear, ends in float."""
    config = QuantizationConfig.from_dict(
        dict(
            type='mmzsq.LSQ',
            w_bits=4,
            a_bits=4,
            weight=dict(per_channel=False, init='lsq', narrow=False),
            activation=dict(scheme='signed', init='lsq'),
            step='linear',
            first_bits=None,
            last_bits=None,
        )
    )
    weight, source = config.weight_quantizer(4, 16), config.input_quantizer(4)
    for quantizer in (weight, source):
        assert (quantizer.num_steps, quantizer.scheme) == (1, 'signed')
        assert (quantizer.qmin, quantizer.qmax, quantizer.init) == (-8, 7, 'lsq')
        assert [name for name, _ in quantizer.named_parameters()] == ['linear_step']
    assert config.bits_of((), ['last']) == (None, 'last layer')


def test_lsqplus_from_config() -> None:
    """Learns the zero point of inputs and has none for weights."""
    config = QuantizationConfig.from_dict(dict(type='mmzsq.LSQPlus'))
    assert isinstance(config.input_quantizer(4), LSQPlus)
    assert 'zero_point' in dict(config.input_quantizer(4).named_parameters())
    assert 'zero_point' not in dict(config.weight_quantizer(4, 3).named_parameters())


def test_scope_comes_before_all_else() -> None:
    """One pattern or several; inside, the other settings decide."""
    config = QuantizationConfig.from_dict(dict(w_bits=4, scope='backbone', first_bits=8, overrides={'neck': 6}))
    assert config.bits_of({'backbone'}, ['first']) == ((8, 8), 'first layer')
    assert config.bits_of({'backbone'}, []) == ((4, 8), '')
    assert config.bits_of({'neck'}, []) == (None, "outside scope 'backbone'")
    several = QuantizationConfig.from_dict(dict(scope=['backbone', '*.fpn_convs']))
    assert several.bits_of({'*.fpn_convs'}, [])[0] == (8, 8)
    assert several.bits_of((), ['last']) == (None, "outside scope 'backbone', '*.fpn_convs'")


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(w_bit=4), "unknown key 'w_bit' in zsq.quantizer. Did you mean 'w_bits'"),
        (dict(weight=dict(perchannel=True)), "in zsq.quantizer.weight. Did you mean 'per_channel'"),
        (dict(activation='offset'), "activation is 'offset', but must be a dict"),
        (dict(type='mmzsq.LSQ2'), "'mmzsq.LSQ2', but must be one of 'mmzsq.LSQ', 'mmzsq.LSQPlus'"),
        (dict(w_bits=9), 'zsq.quantizer.w_bits is 9'),
        (dict(a_bits='4'), "zsq.quantizer.a_bits is '4'"),
        (dict(weight=dict(scheme='offset')), "weight.scheme is 'offset'"),
        (dict(weight=dict(per_channel='yes')), 'per_channel is .*True or False'),
        (dict(activation=dict(init='kl')), "activation.init is 'kl'"),
        (dict(step='cubic'), "step is 'cubic'"),
        (dict(first_bits=16), 'first_bits .*is 16'),
        (dict(skip='backbone'), 'skip .* must be a list'),
        (dict(skip=4), 'skip is 4'),
        (dict(overrides=['a']), 'overrides .* must be a dict'),
        (dict(overrides={'a': 1}), r"overrides\['a'\] is 1"),
        (dict(overrides={'a': dict(w_bits=4)}), 'lacks a_bits'),
        (dict(overrides={'a': dict(bits=4)}), "unknown key 'bits'"),
        (dict(scope=3), 'scope is 3, but must be a module pattern, a list'),
        (dict(attention=16), 'attention is 16'),
        (dict(attention=dict(operand_bits=8)), 'attention lacks probability_bits'),
        (dict(attention=dict(operands=8)), "unknown key 'operands' in zsq.quantizer.attention"),
        (dict(type='mmzsq.LSQPlus', activation=dict(scheme='signed')), "must be 'offset'"),
    ],
)
def test_mistakes_are_named(cfg: dict[str, Any], message: str) -> None:
    """The key, the value and what is allowed."""
    with pytest.raises(UserError, match=message):
        QuantizationConfig.from_dict(cfg)
