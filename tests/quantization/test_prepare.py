# SPDX-License-Identifier: Apache-2.0
"""``prepare``: the layers that it replaces, their bits, and the report."""

from __future__ import annotations

import json
from typing import Any

import mmcv.cnn
import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantizationConfig,
    QuantizedLayer,
    QuantLinear,
    calibrating,
    prepare,
    quantized_layers,
    set_quantization,
)


def _config(**kwargs: Any) -> QuantizationConfig:
    return QuantizationConfig.from_dict(kwargs)


def test_layers_are_swapped_by_their_exact_class(model: nn.Module, images: Tensor) -> None:
    """Float classes that compute or are used otherwise stay float, each with its reason."""
    report = prepare(model, _config(w_bits=4, a_bits=4), run=lambda: model(images))
    assert {name for name, _ in quantized_layers(model)} == {
        'stem', 'block.0', 'block.1', 'embed', 'cls', 'reg', 'attention.out_proj',
        *(f'attention.{name}_projection' for name in ('query', 'key', 'value')),
    }  # fmt: skip
    assert type(model.stem) is QuantConv2d
    assert isinstance(model.stem, nn.Conv2d)
    assert type(model.embed) is QuantLinear
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.quantized}
    assert set(reasons) == {'standardized', 'unused'}
    assert 'no quantized class is registered for WeightStandardized' in reasons['standardized']
    assert reasons['unused'].startswith('did not run')


def test_wrappers_of_mmcv_count_as_the_layers_they_wrap() -> None:
    """They are what many heads of MMDetection are made of."""
    model = nn.Sequential(
        mmcv.cnn.Conv2d(3, 4, 1), mmcv.cnn.ConvTranspose2d(4, 4, 2), nn.Flatten(), mmcv.cnn.Linear(16, 2)
    )
    prepare(model, _config(first_bits='same', last_bits='same'))
    assert [type(layer) for layer in model] == [QuantConv2d, QuantConvTranspose2d, nn.Flatten, QuantLinear]


def test_first_and_last_layers_are_found(model: nn.Module, images: Tensor) -> None:
    """Through shortcuts, in-place activations and a head that runs on two levels."""
    report = prepare(model, _config(w_bits=4, a_bits=5), run=lambda: model(images))
    assert {layer.name: layer.role for layer in report.layers if layer.role} == {
        'stem': 'first', 'cls': 'last', 'reg': 'last',
    }  # fmt: skip
    bits = {layer.name: (layer.w_bits, layer.a_bits) for layer in report.layers}
    assert bits['stem'] == bits['cls'] == bits['reg'] == (8, 8)
    assert bits['block.0'] == bits['embed'] == (4, 5)
    assert bits['unused'] == (32, 32)


def test_a_layer_that_no_other_reads_is_last() -> None:
    """Outputs of a first stage become proposals, without a gradient, and the second stage's are the model's."""

    class TwoStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.propose, self.refine = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.backbone(x)
            return self.refine(x * self.propose(x).detach().argmax())

    model = TwoStage()
    report = prepare(model, _config(w_bits=4, a_bits=4), run=lambda: model(torch.rand(1, 3, 4, 4)))
    assert {layer.name: layer.role for layer in report.layers} == {
        'backbone': 'first', 'propose': 'last', 'refine': 'last',
    }  # fmt: skip


def test_a_layer_inside_another_is_not_last() -> None:
    """The convolution inside a deformable one: its offsets are read there, and by no other layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ModulatedDeformConv2dPack(4, 4, 3), nn.Conv2d(4, 2, 1))
    report = prepare(model, QuantizationConfig.from_dict({}), run=lambda: model(torch.rand(1, 3, 9, 9)))
    assert {row.name: row.role for row in report.layers} == {'0': 'first', '1': '', '1.conv_offset': '', '2': 'last'}
    macs = {row.name: row.macs for row in report.layers}
    assert macs['1'] == 5 * 5 * 4 * 4 * 9
    assert macs['1.conv_offset'] == 5 * 5 * 27 * 4 * 9


def test_layers_outside_the_scope_stay_float(model: nn.Module, images: Tensor) -> None:
    """The report gives the reason; first and last layers inside the scope are as configured."""
    report = prepare(model, _config(w_bits=4, scope=['stem', 'block', 'reg']), run=lambda: model(images))
    rows = {layer.name: layer for layer in report.layers}
    assert {name for name, row in rows.items() if row.quantized} == {'stem', 'block.0', 'block.1', 'reg'}
    assert rows['cls'].reason == "outside scope 'stem', 'block', 'reg'"
    assert (rows['stem'].w_bits, rows['block.0'].w_bits, rows['reg'].w_bits) == (8, 4, 8)


def test_first_and_last_can_stay_float_or_be_ordinary(model: nn.Module, images: Tensor) -> None:
    """None and 'same', with frozen weights, which autograd would not follow by itself."""
    model.requires_grad_(False)
    config = _config(w_bits=3, a_bits=3, first_bits=None, last_bits='same')
    report = prepare(model, config, run=lambda: model(images))
    rows = {layer.name: layer for layer in report.layers}
    assert (rows['stem'].quantized, rows['stem'].reason) == (False, 'first layer')
    assert rows['cls'].w_bits == 3
    assert not model.embed.weight.requires_grad


def test_patterns_decide_before_the_rule(model: nn.Module, images: Tensor) -> None:
    """Skip, then overrides of which the last match counts; a module's name covers its layers."""
    config = _config(
        w_bits=4,
        a_bits=4,
        skip=['*.1'],
        overrides={'block': 6, 'cls': dict(w_bits=2, a_bits=7), 'reg': 5, '?eg': None},
    )
    report = prepare(model, config, run=lambda: model(images))
    rows = {layer.name: layer for layer in report.layers}
    assert (rows['block.0'].w_bits, rows['block.0'].a_bits) == (6, 6)
    assert (rows['block.1'].quantized, rows['block.1'].reason) == (False, "skip '*.1'")
    assert (rows['cls'].w_bits, rows['cls'].a_bits) == (2, 7)
    assert (rows['reg'].quantized, rows['reg'].reason) == (False, "overrides '?eg'")
    assert rows['stem'].w_bits == 8


def test_model_is_left_as_found(model: nn.Module, images: Tensor) -> None:
    """Modes, gradients, BN statistics, hooks and float parameter names."""
    model.train()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    calls: list[str] = []
    model.embed.register_forward_hook(lambda *_: calls.append('embed'))
    names = set(model.state_dict())
    mean = model.bn.running_mean.clone()
    prepare(model, _config(), run=lambda: model(images))
    assert model.training
    assert model.stem.training
    assert not model.bn.training
    assert torch.equal(model.bn.running_mean, mean)
    assert not model.stem.weight.requires_grad
    assert model.cls.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert names <= set(model.state_dict())
    set_quantization(model, False)
    model(images)
    assert calls == ['embed', 'embed']


def test_a_float_checkpoint_loads_into_a_prepared_model(model: nn.Module, images: Tensor) -> None:
    """Only quantizer state is missing, and the output is the float model's."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)['cls'][0]
    prepare(model, _config(), run=lambda: model(images))
    nn.init.zeros_(model.cls.weight)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all('_quantizer.' in key for key in missing)
    set_quantization(model, False)
    torch.testing.assert_close(model(images)['cls'][0], expected)


def test_a_layer_with_two_parents_stays_one_layer() -> None:
    """Heads of MMDetection share convolutions between levels by assignment."""
    model = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 1))])
    model[1][0] = model[0][0]
    report = prepare(model, _config(first_bits='same', last_bits='same'))
    assert model[1][0] is model[0][0]
    assert isinstance(model[1][0], QuantizedLayer)
    assert len(report.layers) == 1


def test_size_and_operations_of_a_known_model() -> None:
    """Counted by hand: 27 * 8 + 8 * 4 weights, 4 biases, at 8 x 8 pixels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1))
    config = _config(w_bits=4, a_bits=6, first_bits='same', last_bits=8)
    report = prepare(model, config, run=lambda: model(torch.rand(1, 3, 8, 8)))
    assert report.size_before == pytest.approx((216 + 32 + 4) * 4e-6)
    steps = (8 + 2) + (4 + 2)
    assert report.size_after == pytest.approx((216 * 0.5 + 32 * 1 + 4 * 4 + steps * 4) * 1e-6)
    macs = [64 * 8 * 27, 64 * 4 * 8]
    assert report.bops_before == sum(macs) * 32 * 32
    assert report.bops_after == macs[0] * 4 * 6 + macs[1] * 8 * 8


def test_report_is_json_and_knows_the_steps(model: nn.Module, images: Tensor) -> None:
    """Steps are absent before calibration and present after it."""
    report = prepare(model, _config(w_bits=4, a_bits=4), run=lambda: model(images))
    before = {row['name']: row for row in report.to_dict()['layers']}
    assert before['stem']['weight']['steps'] is None
    with torch.no_grad(), calibrating(model):
        model(images)
    after = {row['name']: row for row in json.loads(json.dumps(report.to_dict()))['layers']}
    stem = after['stem']
    assert (stem['type'], stem['weights'], stem['role']) == ('Conv2d', 216, 'first')
    assert len(stem['weight']['steps']) == 8
    assert stem['weight']['per_channel']
    assert stem['weight']['zero_points'] is None
    assert (stem['input']['scheme'], stem['input']['qmax']) == ('offset', 255)
    assert stem['input']['zero_points'] == [0.0]
    assert 'weight' not in after['unused']


def test_table_has_a_line_for_each_layer(model: nn.Module, images: Tensor) -> None:
    """Two more lines describe the model."""
    report = prepare(model, _config(w_bits=4, a_bits=4), run=lambda: model(images))
    lines = report.to_table().splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == [layer.name for layer in report.layers]
    assert '4 signed per channel' in lines[2]
    assert lines[-2] == 'model size: 0.01 MB -> 0.00 MB'
    assert lines[-1].startswith('bit operations: ')
    assert report.to_dict()['model']['bops_image_size'] is None


@pytest.mark.parametrize('side', [1, 8])
def test_the_summary_names_weights_that_are_used_without_a_layer(side: int) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(side, 1, 1)
            self.kernel = nn.Parameter(torch.ones(side, 32, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.conv2d(self.first(x), self.kernel))

    model = Functional()
    report = prepare(model, _config(), lambda: model(torch.ones(1, 3, 4, 4)))
    # 8 * 32 of 8 * 32 + 3 * 32 * 9 + 8 weights; 32 of 897 are less, but more than one percent.
    share = {1: '4%', 8: '23%'}[side]
    assert f'{share} of the weights float, since no layer owns them' in report.summary()
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 1, 1))
    report = prepare(plain, _config(), lambda: plain(torch.ones(1, 3, 4, 4)))
    assert 'owns' not in report.summary()


def test_the_report_names_the_image_of_its_operations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1))
    report = prepare(model, _config(), run=lambda: model(torch.zeros(1, 3, 4, 6)), image_size=(4, 6))
    # One filter of 3, 2 and 2 weights for each of 2, 2 and 1 channels.
    assert report.bops_before == 4 * 6 * (2 * 3 + 2 * 2 + 1 * 2) * 32**2
    assert report.to_table().splitlines()[-1].startswith('bit operations of one 4x6 px image: ')
    assert report.to_dict()['model']['bops_image_size'] == [4, 6]


def test_no_run_no_operations() -> None:
    """Without a run the rule for first and last layers must be switched off."""
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="pass `run`.*'same'"):
        prepare(model, _config())
    report = prepare(model, _config(first_bits='same', last_bits='same'))
    assert report.bops_before is report.bops_after is None
    assert 'bit operations' not in report.to_table()


def test_mistakes_are_named(model: nn.Module, images: Tensor) -> None:
    """Predictions instead of raw outputs, patterns without a match, nothing to quantize, a second call."""

    def run() -> Any:
        return model(images)

    with pytest.raises(UserError, match='Return the raw outputs'):
        prepare(model, _config(), run=lambda: run()['cls'][0].detach())
    with pytest.raises(UserError, match="'stemm' matches no layer.*nearest name is 'stem'"):
        prepare(model, _config(skip=['stemm']), run=run)
    with pytest.raises(UserError, match="'backbone' matches no layer"):
        prepare(model, _config(scope='backbone'), run=run)
    with pytest.raises(UserError, match='No layer of the model was quantized'):
        prepare(model, _config(skip=['*']), run=run)
    prepare(model, _config(), run=run)
    with pytest.raises(UserError, match='already'):
        prepare(model, _config(), run=run)
