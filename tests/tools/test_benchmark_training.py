# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training steps, on a small detector: what it writes, and what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = 'tools/analysis_tools/benchmark_training.py'


@pytest.fixture
def call(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*arguments: str) -> None:
        config = str(repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')
        monkeypatch.setattr(sys, 'argv', [TOOL, config, '--image-size', '64', '--device', 'cpu', *arguments])
        runpy.run_path(str(repo / TOOL), run_name='__main__')

    return call


def test_writes_the_time_of_all_three_steps_and_what_they_spend_it_on(call: Any, tmp_path: Path) -> None:
    out = tmp_path / 'benchmark.json'
    call('--batch-size', '2', '--iterations', '1', '--profile', '--out', str(out))
    measured = json.loads(out.read_text())
    assert list(measured['steps']) == ['float', 'quantized', 'distilled']
    assert (measured['image_size'], measured['batch_size'], measured['device']) == ([64, 64], 2, 'cpu')
    for step in measured['steps'].values():
        assert step['ms'] > 0
        assert step['kernels'] >= sum(kernel['count'] for kernel in step['top'])
        times = [kernel['ms'] for kernel in step['top']]
        assert times == sorted(times, reverse=True)
    ratio = measured['steps']['distilled']['ms'] / measured['steps']['float']['ms']
    assert measured['ratio_distilled'] == pytest.approx(ratio, abs=2e-3)


def test_no_step_to_time_is_refused(call: Any) -> None:
    with pytest.raises(SystemExit, match='--iterations is at least 1'):
        call('--iterations', '0')
