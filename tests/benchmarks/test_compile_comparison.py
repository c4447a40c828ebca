# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/compile_comparison.py at toy size, with a compiler backend that generates no code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compile_comparison
import pytest
import torch
from compile_comparison import FUSED, PLAIN, Contender, Variant, compare, load_config, render
from torch import Tensor

from mmzsq.synthesis import batch_norm

TRACED = Variant('compiled', compile=dict(backend='eager'))
CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_fake_quantization_is_the_same_under_all_variants() -> None:
    report = compile_comparison.compare_fake_quantize((FUSED, PLAIN, TRACED), (2, 3, 8, 8), 2, CPU)
    variants = report['variants']
    assert list(variants) == ['fused', 'plain', 'compiled']
    assert len({found['step_gradient'] for found in variants.values()}) == 1
    assert variants['fused']['ratio'] == 1


@pytest.fixture(scope='module')
def config(repo: Path) -> Any:
    return load_config('fp32', repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')


@pytest.mark.slow
def test_synthesis_traces_into_one_graph_and_computes_the_same(config: Any) -> None:
    found = compile_comparison.compare_synthesis(config, (PLAIN, TRACED), 64, 2, 2, 1, CPU)['variants']
    assert found['compiled']['graph_breaks'] == 0 and found['compiled']['recompilations'] == 0
    for name, loss in found['plain']['losses'].items():
        assert found['compiled']['losses'][name] == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_training_traces_into_one_graph(config: Any) -> None:
    found = compile_comparison.compare_training(config, (PLAIN, TRACED), 64, 2, 2, 1, CPU)['variants']
    assert 'error' not in found['compiled'] and found['compiled']['graph_breaks'] == 0
    # Student and teacher, without gradients, once each.
    assert found['compiled']['graphs'] == 2 and found['compiled']['recompilations'] == 0
    assert found['plain']['ratio'] == 1


def test_formulas_for_the_compiler_are_those_of_the_package() -> None:
    features, scale, bias, center = torch.randn(2, 3, 4, 5), *torch.randn(3, 3)
    for own, theirs in zip(
        compile_comparison.channel_statistics(features), batch_norm._statistics(features), strict=True
    ):
        torch.testing.assert_close(own, theirs)
    for middle in (None, center):
        own = compile_comparison.scale_channels(features, scale, bias, middle)
        torch.testing.assert_close(own, batch_norm._scaled(features, scale, bias, middle))


class Constant(Contender):
    """Takes the given seconds; fails after some turns."""

    def __init__(self, seconds: float, turns: int = 99) -> None:
        self.seconds = seconds
        self.turns = turns

    def measure(self) -> list[float]:
        self.turns -= 1
        if self.turns < 0:
            raise RuntimeError('capture failed\nat length')
        return [self.seconds]


def failing() -> Contender:
    raise ValueError('no such backend')


def test_a_variant_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    makers: dict[Variant, Callable[[], Contender]] = {
        FUSED: lambda: Constant(0.001),
        PLAIN: lambda: Constant(0.003, turns=1),
        TRACED: failing,
        Variant('other'): lambda: Constant(0.002),
    }
    found = compare(makers, 3, CPU)
    assert found['plain']['error'] == 'RuntimeError: capture failed'
    assert found['compiled']['error'] == 'ValueError: no such backend'
    assert found['other']['ms'] == 2 and found['other']['ratio'] == 2
    report = dict(device='a GPU', versions=dict(torch='2'), comparisons=dict(step=dict(variants=found)))
    text = render(report)
    assert '| step | other | 2.000 | 2.000 to 2.000 | 2.00 | no | 0 |  |' in text
    assert 'step, compiled failed: `ValueError: no such backend`.' in text


def test_compiled_total_variation_is_the_same() -> None:
    images = torch.rand(2, 3, 8, 8)

    def value() -> Tensor:
        return compile_comparison.priors.total_variation(images)

    with compile_comparison.variant_active(TRACED):
        compiled = value()
    torch.testing.assert_close(compiled, value())


def test_a_machine_without_gpu_gets_one_message(repo: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip('measures for minutes')
    tool = repo / 'benchmarks/compile_comparison.py'
    done = subprocess.run([sys.executable, tool], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: compile_comparison.py compares GPU kernels and needs a CUDA')
