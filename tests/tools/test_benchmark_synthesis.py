# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the synthesis step, at toy size."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = 'tools/analysis_tools/benchmark_synthesis.py'
LEAF = 'configs/zsq/yolov5-p_shapes_w4a4.py'


def benchmark(repo: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, str(repo / LEAF), *options])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


def test_it_times_a_batch_and_says_how_it_ran(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 'benchmark.json'
    size = ('--image-size', '64', '--batch-size', '2', '--iterations', '8', '--device', 'cpu')
    benchmark(repo, monkeypatch, *size, '--out', str(out))
    measured = json.loads(out.read_text())
    assert measured['image_size'] == [64, 64]
    assert measured['batch_size'] == 2
    assert measured['ms_per_image_iteration'] > 0
    # 16 image-iterations in all: the steady part cannot be slower than the whole.
    assert measured['ms_per_image_iteration'] * 3 * 2 < 1000 * measured['seconds_per_batch'] + 1
    assert measured['weights'] == 'random'
    assert measured['cuda_graph'] is False
    assert 'detection' in measured['losses']


def test_too_few_iterations_are_refused(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match='--iterations is at least 6, not 3'):
        benchmark(repo, monkeypatch, '--iterations', '3')
