# SPDX-License-Identifier: Apache-2.0
"""Trained grids on the outputs of layers, activation functions and sums."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.qat.frozen_batch_norm import FrozenBatchNorm, speed_up_frozen_batch_norm
from mmzsq.quantization import (
    LSQ,
    QuantizationConfig,
    QuantizationReport,
    calibrating,
    prepare,
    quantizers,
    set_quantization,
    step_parameters,
)


class Bottleneck(nn.Module):
    """Convolution, BatchNorm, activation and a shortcut."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.bn(self.conv(x)))


class Network(nn.Module):
    """A stem, two shortcuts in a row, a layer without BatchNorm, two branches of a concatenation, a head."""

    def __init__(self, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation()
        self.blocks = nn.Sequential(Bottleneck(activation), Bottleneck(activation))
        self.plain, self.plain_act = nn.Conv2d(4, 4, 1), activation()
        self.left, self.right, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain_act(self.plain(self.blocks(self.act(self.bn(self.stem(x))))))
        return self.head(torch.cat((self.left(x), self.right(x)), 1))


def _prepared(images: Tensor, model: nn.Module | None = None, **config: Any) -> tuple[Any, QuantizationReport]:
    model = Network() if model is None else model
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.normal_(1.0, 0.5)
                module.bias.normal_()
                module.running_mean.normal_(0.0, 0.1)
    report = prepare(model, QuantizationConfig.from_dict(config), run=lambda: model(images[:1]))
    with torch.no_grad(), calibrating(model):
        model(images)
    return model, report


def _hosts(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, 'output_quantizer')}


def _is_on(grid: LSQ, x: Tensor) -> bool:
    levels = x / grid.step
    return bool(((levels - levels.round()).abs() < 1e-3).all())


def test_grids_stand_behind_batch_norm_activation_and_sum(images: Tensor) -> None:
    """The head's output has none, and neither has a value that layers with one grid read."""
    model, _ = _prepared(images, outputs=8)
    assert _hosts(model) == {
        'bn', 'act', 'blocks.0.bn', 'blocks.0.act', 'blocks.0', 'blocks.1.bn', 'blocks.1.act', 'plain',
    }  # fmt: skip
    # A shortcut and the convolution beside it read one value, as do both branches.
    assert model.act.output_quantizer is model.blocks[0].conv.input_quantizer
    assert model.blocks[0].output_quantizer is model.blocks[1].conv.input_quantizer
    assert model.left.input_quantizer is model.right.input_quantizer
    assert model.blocks[0].act.output_quantizer is not model.blocks[0].output_quantizer


def test_what_follows_reads_values_on_the_grid(images: Tensor) -> None:
    model, _ = _prepared(images, outputs=8)
    seen: dict[str, Tensor] = {}
    for name in ('act', 'blocks.1', 'plain_act'):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    sigmoid: list[Tensor] = []
    model.act.sigmoid_quantizer.register_forward_hook(lambda _, args, output: sigmoid.append(output))
    with torch.no_grad():
        model(images)
    assert _is_on(model.bn.output_quantizer, seen['act'])
    assert _is_on(model.blocks[0].output_quantizer, seen['blocks.1'])
    assert _is_on(model.plain.output_quantizer, seen['plain_act'])
    assert torch.equal(sigmoid[0] * 256, (sigmoid[0] * 256).round())
    torch.testing.assert_close(sigmoid[0], seen['act'].sigmoid(), rtol=0, atol=1 / 256)


def test_a_relu_needs_no_grid_before_it(images: Tensor) -> None:
    """The grid behind it starts at zero, and clips by itself."""
    model, _ = _prepared(images, Network(nn.ReLU), outputs=8)
    assert _hosts(model) == {'act', 'blocks.0.act', 'blocks.0', 'blocks.1.act'}
    assert int(model.act.output_quantizer.zero_point) == 0


def test_every_step_gets_a_gradient(images: Tensor) -> None:
    """That behind a BatchNorm is checked against equation 3 of LSQ, written out for scalars."""
    model, _ = _prepared(images, outputs=8)
    quantizer = model.bn.output_quantizer
    with torch.no_grad():
        # So small that some values lie outside of the range.
        quantizer.log_step -= 0.3
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append(args[0].detach())
        output.register_hook(seen.append)

    quantizer.register_forward_hook(watch)
    model(images).square().mean().backward()
    names = [name for name, _ in step_parameters(model)]
    assert all('_quantizer.' in name for name in names)
    assert all(float(parameter.grad.abs().sum()) > 0 for _, parameter in step_parameters(model))

    step, zero = quantizer.step.item(), quantizer.zero_point.item()
    expected, outside = 0.0, 0
    for x, dy in zip(seen[0].flatten().tolist(), seen[1].flatten().tolist(), strict=True):
        level = x / step
        inside = -zero <= level <= 255 - zero
        outside += not inside
        expected += dy * (round(level) - level if inside else min(max(level, -zero), 255 - zero))
    assert 0 < outside < seen[0].numel() / 2
    expected *= step / (seen[0].numel() * 255) ** 0.5
    assert quantizer.log_step.grad.item() == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_round_trip(images: Tensor) -> None:
    model, _ = _prepared(images, outputs=8)
    other, _ = _prepared(2 * images, outputs=8)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(images), model(images))
    assert not [name for name in model.state_dict() if 'sigmoid_quantizer' in name]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    assert twin.left.input_quantizer is twin.right.input_quantizer is not model.left.input_quantizer


def test_a_float_checkpoint_loads_and_computes_in_float(images: Tensor) -> None:
    model = Network().eval()
    expected, state = model(images), copy.deepcopy(model.state_dict())
    prepared, _ = _prepared(images, Network(), outputs=8)
    missing, unexpected = prepared.load_state_dict(state, strict=False)
    assert not unexpected and all('_quantizer.' in name for name in missing)
    set_quantization(prepared, False)
    torch.testing.assert_close(prepared(images), expected)


def test_frozen_batch_norm_keeps_its_grid(images: Tensor) -> None:
    model, _ = _prepared(images, outputs=8)
    expected = model(images)
    speed_up_frozen_batch_norm(model)
    assert type(model.bn) is FrozenBatchNorm
    assert torch.equal(model(images), expected)
    assert _is_on(model.bn.output_quantizer, model.bn(torch.randn(1, 4, 3, 3)))


def test_the_report_describes_outputs(images: Tensor) -> None:
    model, report = _prepared(images, outputs=8)
    rows = {row['name']: row for row in json.loads(json.dumps(report.to_dict()))['layers']}
    assert rows['stem']['output']['steps'] == pytest.approx([model.bn.output_quantizer.step.item()])
    assert rows['plain']['output']['bits'] == 8
    assert 'output' not in rows['head'] and 'output' not in rows['left']
    assert 'output step' in report.to_table().splitlines()[0]


def test_the_report_names_sums_that_no_module_returns(images: Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.low(x) + self.high(x)
            return self.last(self.out(x) + x)

    model, report = _prepared(images, Pyramid(), outputs=8)
    assert _hosts(model) == {'low', 'high', 'out'}
    assert report.float_values == ['out']
    assert report.to_dict()['model']['float_values'] == ['out']
    assert report.to_table().splitlines()[-1] == 'float values near these modules: out'


def test_without_the_setting_nothing_is_added(images: Tensor) -> None:
    torch.manual_seed(0)
    model, report = _prepared(images)
    assert not _hosts(model) and type(model.act) is nn.SiLU
    assert model.left.input_quantizer is not model.right.input_quantizer
    assert all('output' not in row for row in report.to_dict()['layers'])
    assert 'output step' not in report.to_table()


def test_fewer_bits_and_a_scope(images: Tensor) -> None:
    """Layers whose inputs have other bits keep grids of their own; float layers get none."""
    model, _ = _prepared(images, outputs=6, a_bits=6, overrides={'blocks.1': 4}, skip=['plain'])
    assert 'plain' not in _hosts(model) and type(model.plain_act) is nn.SiLU
    assert model.bn.output_quantizer.bits == 6
    assert model.blocks[1].conv.input_quantizer.bits == 4
    assert model.blocks[0].output_quantizer is not model.blocks[1].conv.input_quantizer


def test_tensorrt_quantizes_shortcuts_and_is_symmetric(images: Tensor) -> None:
    model, _ = _prepared(images, target='tensorrt')
    # The identity of each addition, not the branch that the addition is fused into.
    assert _hosts(model) == {'act', 'blocks.0'}
    assert type(model.act) is nn.SiLU
    activations = [q for name, q in quantizers(model) if 'weight' not in name]
    assert {(q.scheme, q.bits) for q in activations} == {('signed', 8)}
    few, _ = _prepared(images, target='tensorrt', a_bits=7, first_bits='same', last_bits='same')
    assert few.plain.input_quantizer.scheme == 'offset'


def test_target_onnxruntime_means_outputs_of_8_bits() -> None:
    target, outputs, neither = (
        QuantizationConfig.from_dict(cfg).integers() for cfg in (dict(target='onnxruntime'), dict(outputs=8), dict())
    )
    assert target == outputs != neither
    assert QuantizationConfig.from_dict(dict(target='openvino')).integers() == neither


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(outputs=9), 'zsq.quantizer.outputs is 9, but must be'),
        (dict(outputs=8, target='tensorrt'), 'zsq.quantizer.outputs is for ONNX Runtime'),
        (dict(outputs=8, allocate=dict()), 'zsq.quantizer.allocate gives layers bits of their own'),
        (dict(target='coreml'), 'zsq.quantizer.target'),
    ],
)
def test_mistakes_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizationConfig.from_dict(config)


def test_a_run_is_needed() -> None:
    config = QuantizationConfig.from_dict(dict(outputs=8, first_bits='same', last_bits='same'))
    with pytest.raises(UserError, match='need a run of the model'):
        prepare(Network(), config)
