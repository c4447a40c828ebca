# SPDX-License-Identifier: Apache-2.0
"""The part of the values that training leaves unquantized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmzsq.engine.hooks import QuantizationDropHook
from mmzsq.errors import UserError
from mmzsq.quantization import QuantizationConfig, calibrating, prepare


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    prepare(model, QuantizationConfig(w_bits=2, a_bits=2), run=lambda: model(torch.rand(1, 3, 8, 8)))
    with torch.no_grad(), calibrating(model):
        model(torch.rand(2, 3, 8, 8))
    return model.train()


def runner_of(student: nn.Module) -> Any:
    return SimpleNamespace(detector=SimpleNamespace(student=student), iter=0, max_iters=100)


def test_all_dropped_is_the_float_layer_and_none_the_quantized_one(student: Any) -> None:
    hook, runner, x = (
        QuantizationDropHook(activations=1.0, weights=1.0, until=0.5),
        runner_of(student),
        torch.rand(2, 3, 8, 8),
    )
    quantized = student(x)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    float_output = x
    for layer in student:
        float_output = nn.functional.conv2d(float_output, layer.weight, layer.bias)
    torch.testing.assert_close(student(x), float_output)
    # In use, all is quantized.
    torch.testing.assert_close(student.eval()(x), quantized)
    runner.iter = 50
    hook.before_train_iter(runner, 0)
    torch.testing.assert_close(student.train()(x), quantized)
    assert not any('drop' in key for key in student.state_dict())


def test_the_part_shrinks_along_a_line_and_is_drawn_anew(student: Any) -> None:
    hook, runner = QuantizationDropHook(activations=0.8, until=0.5), runner_of(student)
    hook.before_train(runner)
    quantizer = student[1].input_quantizer
    x = torch.rand(40000) + 0.013
    levels = quantizer.eval()(x)
    quantizer.train()
    for iteration, part in ((0, 0.8), (25, 0.4), (40, 0.16), (60, 0.0)):
        runner.iter = iteration
        hook.before_train_iter(runner, iteration)
        outputs = [quantizer(x) for _ in range(2)]
        for output in outputs:
            kept = output == x
            assert float(kept.float().mean()) == pytest.approx(part, abs=0.02)
            assert torch.equal(output[~kept], levels[~kept])
        assert torch.equal(*outputs) is (part == 0)
    # Weights were not asked for.
    assert student[1].weight_quantizer.drop is None


def test_what_is_dropped_passes_its_gradient_and_teaches_the_step_nothing(student: Any) -> None:
    hook, runner = QuantizationDropHook(activations=1.0), runner_of(student)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    quantizer = student[1].input_quantizer
    # Far outside the range, where a quantizer passes nothing.
    x = torch.full((5,), 1e4, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0] * 5
    assert all(float(p.grad.abs().sum()) == 0 for p in quantizer.parameters())
    hook.after_train(runner)
    assert quantizer.drop is None


@pytest.mark.parametrize('wrong', [dict(activations=1.5), dict(weights=-0.1), dict(until='half')])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r'zsq\.train\.drop\.\w+ is a number from 0 to 1'):
        QuantizationDropHook(**wrong)
