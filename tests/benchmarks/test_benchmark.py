# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/benchmark.py at toy size on the CPU."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import benchmark
import benchmark_steps
import pytest
import torch
from benchmark import measure, parse
from benchmark_meter import Profile
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.fused_kernels import fused_kernels_enabled
from mmzsq.models.train_eval_modes import eval_mode
from mmzsq.synthesis.label_samplers import LabelSampler, RelabelCounts

TOOL = 'benchmarks/benchmark.py'
LEAF = 'configs/zsq/yolov5-p_shapes_w4a4.py'
QUICK_START = ('zsq.quantizer.weight.init=lsq', 'zsq.quantizer.activation.init=lsq')
SIZE = ('--image-size', '64', '--batch-size', '2', '--device', 'cpu')


def run(repo: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Call the tool as a user does."""
    monkeypatch.setattr(sys, 'argv', [TOOL, str(repo / LEAF), *options])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


class ShortProfile(Profile):
    """Profiles one operator instead of steps, since reading the profile of a training step on the CPU takes seconds."""

    def start(self) -> None:
        super().start()
        torch.ones(2) + 1
        super().stop()

    def stop(self) -> None:
        pass


@pytest.fixture(scope='module')
def measured(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All three measurements, as the tool writes them. One step is enough for training."""
    folder = tmp_path_factory.mktemp('benchmark')
    written = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(benchmark_steps, 'PROFILED_STEPS', 1)
        monkeypatch.setattr(benchmark_steps, 'TRAINING_WARMUP', 1)
        for what, steps in (('synthesis', '2'), ('relabel', '5'), ('training', '1')):
            out = folder / f'{what}.json'
            options = ('--repeats', '2', '--steps', steps, '--out', str(out), '--cfg-options', *QUICK_START)
            run(repo, monkeypatch, '--what', what, *SIZE, *options)
            written.update(json.loads(out.read_text()))
            monkeypatch.setattr(benchmark_steps, 'Profile', ShortProfile)
    return written


def test_the_recorded_command_repeats_the_measurement(measured: dict[str, Any]) -> None:
    words = shlex.split(measured['command'])
    assert words[:3] == ['python', TOOL, LEAF]
    again = parse([*words[2:], '--out', 'a.json'])
    assert (again.what, again.image_size, again.batch_size) == (['training'], [64], 2)
    assert (again.repeats, again.steps) == (2, 1)
    assert again.cfg_options == {'zsq.quantizer.weight.init': 'lsq', 'zsq.quantizer.activation.init': 'lsq'}
    assert measured['config'] == LEAF
    assert measured['weights'] == 'random'
    assert measured['device'].startswith('CPU')
    assert measured['versions']['torch'] == torch.__version__


def test_synthesis_step_reports_time_and_execution(measured: dict[str, Any]) -> None:
    step = measured['synthesis']
    low, high = step['spread']
    assert 0 < low <= step['ms_per_image_iteration'] <= high
    assert (step['image_size'], step['batch_size'], step['precision']) == ([64, 64], 2, 'fp32')
    assert step['cuda_graph'] is False
    assert (step['added'], step['removed']) == (0, 0)
    assert {'detection', 'BNStatisticsPrior', 'TotalVariationPrior'} <= set(step['losses'])
    times = [kernel['ms'] for kernel in step['top']]
    assert len(times) == 10 and times == sorted(times, reverse=True)
    assert step['kernels'] > sum(kernel['count'] for kernel in step['top'])


def test_every_relabeling_updates_labels_in_place(measured: dict[str, Any]) -> None:
    part = measured['relabel']
    # One warm-up step, one step in each of two measurements, one profiled step.
    assert part['added'] >= 4
    assert part['captures_lost'] == 0
    assert part['predictions'] == 'drawn'
    # As often as the sampler relabels in the stage of the config.
    assert part['corrections'] > 0
    expected = part['ms_per_image_step'] + part['ms_per_image_correction'] * part['corrections'] / part['iterations']
    assert part['ms_per_image_iteration'] == pytest.approx(expected, abs=1e-3)


def test_float_quantized_and_distilled_steps_are_compared(measured: dict[str, Any]) -> None:
    part = measured['training']
    assert list(part['steps']) == ['float', 'quantized', 'distilled']
    for step in part['steps'].values():
        assert step['images_per_second'] == pytest.approx(2000 / step['ms'], rel=0.01)
        assert step['cuda_graph'] is False
        assert 'aten::add' in [kernel['name'] for kernel in step['top']]
    for name in ('quantized', 'distilled'):
        low, high = part[f'ratio_{name}_spread']
        assert 0 < low <= part[f'ratio_{name}'] <= high


class Correction(LabelSampler):
    """Takes an hour on the clock below and changes nothing."""

    adaptive = True

    def sample(self, *args: Any) -> list[InstanceData]:
        raise NotImplementedError

    def relabel(self, labels: Any, predictions: Any, image_size: Any) -> tuple[list[InstanceData], RelabelCounts]:
        Clock.now += 3600
        return labels, RelabelCounts()


class Clock:
    """A wall clock on which each step takes a second."""

    now = 0.0

    @staticmethod
    def perf_counter() -> float:
        return Clock.now


@pytest.mark.parametrize('sampler', [None, Correction()])
def test_measurements_cover_whole_steps_and_every_second_one_relabels(
    sampler: LabelSampler | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('benchmark_meter.time', Clock)
    settings = benchmark_steps.Settings(None, None, repeats=2, steps=7, checkpoint=None, device=torch.device('cpu'))
    clock = benchmark_steps._Clock(sampler, settings)
    corrected = []
    for iteration in range(clock.iterations):
        if clock.should_relabel(iteration):
            corrected.append(iteration)
            clock.relabel([], [], (64, 64))
        Clock.now += 1
    if sampler is None:
        assert clock.seconds == [7, 7]
    else:
        assert clock.seconds == [7, 3607, 7, 3607]
    assert len(corrected) == clock.corrections
    # One step more than is profiled: it ends the profile.
    warmup, profiled = benchmark_steps.SYNTHESIS_WARMUP, benchmark_steps.PROFILED_STEPS
    assert clock.iterations == warmup + len(clock.seconds) * 7 + profiled + 1


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--repeats', '0'), '--repeats must be at least 1, not 0'),
        (('--batch-size', '0'), '--batch-size must be at least 1, not 0'),
        (('--image-size', '64', '64', '64'), '--image-size takes one or two numbers of pixels'),
        (('--what', 'relabel', '--steps', '4'), '--steps must be at least 5 for relabeling, not 4'),
    ],
)
def test_a_mistake_is_one_message(
    repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(repo, monkeypatch, '--device', 'cpu', '--out', 'unused.json', *options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_general_path_is_switched_on_only_for_the_measurement(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def look(*_: Any) -> dict[str, Any]:
        allowed.append(fused_kernels_enabled())
        return {}

    monkeypatch.setitem(benchmark.MEASURES, 'synthesis', look)
    options = [str(repo / LEAF), '--what', 'synthesis', *SIZE, '--out', 'unused.json']
    results = [measure(parse([*options, *more])) for more in ([], ['--general'], [])]
    assert allowed == [result['fused_kernels'] for result in results] == [True, False, True]
    assert [word for word in shlex.split(results[1]['command']) if word == '--general']


def test_a_config_without_a_section_is_refused(repo: Path) -> None:
    args = parse([str(repo / 'configs/shapes/yolov5-p_shapes.py'), '--out', 'unused.json'])
    with pytest.raises(UserError, match='has no zsq section'):
        measure(args)


def test_random_weights_give_normalized_activations(repo: Path) -> None:
    """With PyTorch's initial weights, activations reach millions, and their exponentials are infinite."""
    cfg = Config.fromfile(repo / 'configs/zsq/yolox-s_w4a8.py')
    cfg.model.backbone.widen_factor = 0.125
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=32)
    cfg.model.bbox_head.update(in_channels=32, feat_channels=32)
    detector: Any = benchmark_steps.build_detector(cfg, None)
    assert detector.training
    ratios = []

    def compare(layer: Any, inputs: tuple[torch.Tensor]) -> None:
        ratios.append(float(inputs[0].square().mean() / layer.running_var.mean()))

    for layer in detector.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(compare)
    with torch.no_grad(), eval_mode(detector, keep=()):
        detector(torch.rand(1, 3, 256, 256) * 255, mode='tensor')
    # Another noise image gives every layer about the same statistics.
    assert len(ratios) > 50
    assert 0.5 < min(ratios) and max(ratios) < 100
    # Different weights would be a different benchmark.
    again = benchmark_steps.build_detector(cfg, None).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in detector.state_dict().items())


def test_relabeling_needs_an_adaptive_sampler(repo: Path, tmp_path: Path) -> None:
    config = tmp_path / 'blind.py'
    sampler = "dict(type='mmzsq.SingleBoxSampler', _delete_=True)"
    config.write_text(f"_base_ = ['{repo / LEAF}']\nzsq = dict(label_sampler={sampler})\n")
    with pytest.raises(UserError, match='SingleBoxSampler does not correct labels'):
        measure(parse([str(config), '--what', 'relabel', *SIZE, '--out', 'unused.json']))
