# SPDX-License-Identifier: Apache-2.0
"""The language that selects modules: names with wildcards, regular expressions and classes."""

from __future__ import annotations

import pytest
from torch import nn

from mmzsq.distillation import FeatureMSELoss, PredictionKLLoss
from mmzsq.errors import UserError
from mmzsq.module_patterns import enclosing_patterns, select_modules
from mmzsq.quantization import QuantizationConfig, prepare


class Block(nn.Sequential):
    """A convolution and its BatchNorm."""


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({'stem': Block(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
        self.backbone['layer1'] = Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.backbone['layer10'] = Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.bbox_head = nn.Conv2d(4, 6, 1)


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        ('backbone', ['backbone']),
        ('backbone.layer1', ['backbone.layer1']),
        ('*.0', ['backbone.stem.0', 'backbone.layer1.0', 'backbone.layer10.0']),
        ('backbone.layer*', [f'backbone.layer{n}{part}' for n in (1, 10) for part in ('', '.0', '.1')]),
        ('backbone.layer?', ['backbone.layer1']),
        ('backbone.[!l]*', ['backbone.stem', 'backbone.stem.0', 'backbone.stem.1']),
        (r're:backbone\.layer\d+', ['backbone.layer1', 'backbone.layer10']),
        ('re:layer1', []),
        ('re:.*head', ['bbox_head']),
        ('type:Block', ['backbone.stem', 'backbone.layer1', 'backbone.layer10']),
        ('type:Sequential', ['backbone.stem', 'backbone.layer1', 'backbone.layer10']),
        ('type:_BatchNorm', ['backbone.stem.1', 'backbone.layer1.1', 'backbone.layer10.1']),
        ('type:Detector', ['']),
        ('type:Conv*', []),
        ('Backbone', []),
    ],
)
def test_each_form_of_a_pattern(pattern: str, expected: list[str]) -> None:
    """Names are matched in full and by case; classes through all bases."""
    detector = Detector()
    if not expected:
        with pytest.raises(UserError, match='no module of Detector matches'):
            select_modules(detector, [pattern])
    else:
        assert select_modules(detector, [pattern]) == expected


def test_modules_of_several_patterns_are_listed_once_in_order_of_registration() -> None:
    assert select_modules(Detector(), ['bbox_head', 'backbone.stem.*', 'type:Conv2d']) == [
        'backbone.stem.0', 'backbone.stem.1', 'backbone.layer1.0', 'backbone.layer10.0', 'bbox_head',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('pattern', 'inside'),
    [
        ('backbone.layer1', ['backbone.layer1', 'backbone.layer1.0', 'backbone.layer1.1']),
        ('*.1', ['backbone.stem.1', 'backbone.layer1.1', 'backbone.layer10.1']),
        (r're:.*\.stem', ['backbone.stem', 'backbone.stem.0', 'backbone.stem.1']),
        ('type:Conv2d', ['backbone.stem.0', 'backbone.layer1.0', 'backbone.layer10.0', 'bbox_head']),
        ('type:ModuleDict', [name for name, _ in Detector().named_modules() if name.startswith('backbone')]),
        ('type:Detector', [name for name, _ in Detector().named_modules()]),
        ('neck', []),
    ],
)
def test_a_pattern_encloses_what_is_inside_its_modules(pattern: str, inside: list[str]) -> None:
    """``layer1`` does not enclose ``layer10``."""
    found = enclosing_patterns(Detector(), [pattern])
    assert list(found) == [name for name, _ in Detector().named_modules()]
    assert [name for name, patterns in found.items() if patterns] == inside


@pytest.mark.parametrize(
    ('pattern', 'message'),
    [
        ('bbox_heads', "matches 'bbox_heads'; the nearest name is 'bbox_head'"),
        ('type:BatchNorm', "matches 'type:BatchNorm'; the nearest class is '_BatchNorm'"),
        ('zzz', "matches 'zzz'\\."),
        ('re:neck.*', r"matches 're:neck\.\*'\."),
        ('re:(', r"'re:\(' is not a valid regular expression: missing \)"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_with_a_suggestion(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_modules(Detector(), [pattern])


def test_quantizer_and_distillation_share_one_pattern_syntax() -> None:
    """The quantizer takes every layer inside, a loss the outputs of the modules themselves."""
    detector = Detector()
    assert FeatureMSELoss([r're:backbone\.layer\d+']).taps(detector) == ['backbone.layer1', 'backbone.layer10']
    assert FeatureMSELoss('type:Block').taps(detector) == ['backbone.stem', 'backbone.layer1', 'backbone.layer10']
    assert PredictionKLLoss(heads='*_head').taps(detector) == ['bbox_head']
    # In the order of the config, which is that of the maps in a joined vector.
    assert PredictionKLLoss(heads=['bbox_head', 'backbone.stem']).taps(detector) == ['bbox_head', 'backbone.stem']
    config = QuantizationConfig.from_dict(
        dict(
            w_bits=4,
            first_bits='same',
            last_bits='same',
            scope=r're:backbone\.(stem|layer1)',
            skip=['backbone.stem'],
            overrides={'type:Conv2d': 6},
        )
    )
    report = prepare(detector, config)
    assert {layer.name: (layer.w_bits, layer.reason) for layer in report.layers} == {
        'backbone.stem.0': (32, "skip 'backbone.stem'"),
        'backbone.layer1.0': (6, "overrides 'type:Conv2d'"),
        'backbone.layer10.0': (32, r"outside scope 're:backbone\\.(stem|layer1)'"),
        'bbox_head': (32, r"outside scope 're:backbone\\.(stem|layer1)'"),
    }


@pytest.mark.parametrize('pattern', ['type:BatchNorm2d', 'backbone.*.1', 're:neck', 'type:Conv3d'])
def test_a_quantizer_pattern_must_select_a_layer(pattern: str) -> None:
    """Modules without a weight to quantize do not count."""
    config = QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same', skip=[pattern]))
    with pytest.raises(UserError, match='matches no layer of the model'):
        prepare(Detector(), config)
