# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/scaling.py at toy size on the CPU."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scaling

from mmzsq.errors import UserError

TOOL = 'benchmarks/scaling.py'
CONFIG = 'configs/zsq/yolov5-p_shapes_w4a4.py'
TOY = (
    'zsq.calibration_set.num_images=3',
    'zsq.synthesis.relabel.image_size=64',
    'zsq.synthesis.relabel.iterations=2',
    'zsq.synthesis.relabel.batch_size=1',
    'zsq.synthesis.synthesize.image_size=64',
    'zsq.synthesis.synthesize.iterations=1',
    'zsq.synthesis.synthesize.batch_size=1',
    'zsq.train.max_epochs=2',
    'zsq.train.batch_size=1',
    'zsq.train.num_workers=0',
    'zsq.train.init_batches=1',
    *(f'val_{part}=None' for part in ('dataloader', 'evaluator', 'cfg')),
)


PLAIN_CONFIGS = """
from mmengine.config import Config

# Without their layout, which takes seconds each time that a config is logged or saved.
Config.pretty_text = property(lambda cfg: '')
"""


@pytest.fixture
def call(repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def call(*arguments: str) -> None:
        (tmp_path / 'sitecustomize.py').write_text(PLAIN_CONFIGS)
        monkeypatch.setenv('PYTHONPATH', str(tmp_path))
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        weights = 'mmzsq://yolov5-p_shapes.safetensors'
        monkeypatch.setattr(sys, 'argv', [str(repo / TOOL), str(repo / CONFIG), '--checkpoint', weights, *arguments])
        runpy.run_path(str(repo / TOOL), run_name='__main__')

    return call


def test_times_one_and_two_processes_and_finds_their_sets_equal(call: Any, tmp_path: Path) -> None:
    out = tmp_path / 'scaling.json'
    call('--gpus', '1', '2', '--out', str(out), '--cfg-options', *TOY)
    measured = json.loads(out.read_text())
    assert measured['same_set']
    one, two = measured['runs']['1'], measured['runs']['2']
    assert one['set_sha256'] == two['set_sha256']
    parts = {
        'start_up',
        'warm_up',
        'claim',
        'synthesis',
        'merge',
        'verification',
        'initialization',
        'training_step',
        'loading',
    }
    for run in (one, two):
        assert (run['images'], run['shards'], run['batch_size']) == (3, 3, 1)
        assert parts < set(run['seconds'])
        assert all(run['seconds'][part] > 0 for part in parts)
    # The processes share the images of an epoch.
    assert (one['train_steps'], two['train_steps']) == (6, 4)
    assert len(one['synthesis_seconds']) == 1
    assert max(two['synthesis_seconds']) == two['seconds']['synthesis']
    assert one['seconds']['all_reduce'] == 0 < two['seconds']['all_reduce']
    made = [sum(run['seconds'][part] for part in ('claim', 'synthesis', 'merge', 'verification')) for run in (one, two)]
    assert measured['speedup']['generation'] == pytest.approx(made[0] / made[1], abs=2e-3)
    assert measured['speedup']['training'] == pytest.approx(
        2 * one['seconds']['training_step'] / two['seconds']['training_step'], rel=0.01
    )
    serial = made[0] - one['seconds']['synthesis']
    assert measured['serial_share']['generation'] == pytest.approx(serial / made[0], abs=1e-4)
    assert {'device', 'versions', 'command'} < set(measured)


def test_gpus_must_start_with_one(call: Any) -> None:
    with pytest.raises(SystemExit, match='--gpus must be 1 followed by increasing numbers, not 2'):
        call('--gpus', '2')


@pytest.mark.parametrize(
    ('code', 'message'),
    [('import time; print("so far"); time.sleep(60)', 'did not finish within 3 s'), ('1 / 0', 'code 1')],
)
def test_a_failed_or_hanging_run_shows_the_end_of_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    worker = tmp_path / 'worker.py'
    worker.write_text(code)
    monkeypatch.setattr(scaling, '__file__', str(worker))
    monkeypatch.setattr(scaling, 'RUN_SECONDS', 3)
    monkeypatch.setenv('PYTHONUNBUFFERED', '1')
    with pytest.raises(UserError, match=f'the run of 1 process .*{message}') as error:
        scaling.run(SimpleNamespace(), 'weights.pth', 1, tmp_path / 'run')
    assert 'so far' in str(error.value) or 'ZeroDivisionError' in str(error.value)


def test_a_step_is_timed_within_epochs_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 epochs of 4 steps that take 1 s each, and 100 s until the workers of an epoch have started."""
    clock, time = scaling.Clock(), [0.0]
    monkeypatch.setattr(scaling, 'now', lambda: time[0])
    runner = SimpleNamespace(iter=0, max_iters=120, train_dataloader=range(4))
    hook = scaling.StepsHook(clock)
    for _ in range(30):
        hook.before_train_epoch(runner)
        time[0] += 100
        for step in range(4):
            # Until everything is compiled and captured, a step takes ten times as long. A quarter of it is loading.
            seconds = 10 if runner.iter < scaling.WARM_UP_STEPS else 1
            time[0] += 0.25 * seconds
            hook.before_train_iter(runner, step)
            time[0] += 0.75 * seconds
            hook.after_train_iter(runner, step)
            runner.iter += 1
    hook.after_train(runner)
    assert clock.seconds['training_step'] == 1
    assert clock.seconds['loading'] == 0.25


def test_epochs_of_one_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, runner = scaling.StepsHook(scaling.Clock()), SimpleNamespace(iter=0, max_iters=2, train_dataloader=[0])
    for runner.iter in range(2):
        hook.before_train_epoch(runner)
        hook.after_train_iter(runner, 0)
    with pytest.raises(UserError, match='epochs of 1 steps are too short.*num_images'):
        hook.after_train(runner)
