# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/benchmark_meter.py: arithmetic, and profiles of known operators."""

from __future__ import annotations

import doctest
import time
from types import SimpleNamespace
from typing import Any

import benchmark_meter
import pytest
import torch
from benchmark_meter import PeakMemory, Profile, Stopwatch, covered, middle, top_costs

CPU = torch.device('cpu')
CUDA = torch.autograd.DeviceType.CUDA


def event(name: str, start: float, end: float, device_type: Any = None, **more: Any) -> SimpleNamespace:
    """An event of PyTorch's profiler; times in microseconds."""
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device_type, **more)


def profile_of(events: list[SimpleNamespace]) -> Profile:
    """A profile of a GPU that recorded these events."""
    profile = Profile(CPU)
    profile.on_cuda = True
    profile._profiler = SimpleNamespace(events=lambda: events)
    return profile


def test_the_examples_of_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(benchmark_meter)
    assert tried == 3 and failed == 0


def test_middle_is_the_median() -> None:
    assert middle([1.0, 2.0, 90.0]) == (2.0, [1.0, 90.0])
    assert middle([1.0, 2.0], digits=1) == (1.5, [1.0, 2.0])


def test_overlapping_intervals_count_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 10), (2, 3), (10, 11), (20, 21)]) == 12


def test_a_lap_is_the_time_since_the_last() -> None:
    watch = Stopwatch(CPU)
    watch.start()
    time.sleep(0.02)
    assert watch.lap() >= 0.02
    assert watch.lap() < 0.02
    assert watch.mean_utilization is None


def test_a_failing_driver_query_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(device: Any) -> int:
        asked.append(device)
        if len(asked) > 1:
            raise OSError('not supported')
        return 70

    monkeypatch.setattr(torch.cuda, 'utilization', refuse)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    watch = Stopwatch(torch.device('cuda'))
    watch.start()
    for _ in range(4):
        watch.lap()
    assert watch.mean_utilization == 70
    assert len(asked) == 2


def test_a_cpu_has_no_peak_memory() -> None:
    assert PeakMemory(CPU).read() == dict(peak_memory_gib=None, peak_reserved_gib=None)


def test_a_gpu_profile_separates_kernels_from_named_ranges() -> None:
    measured = profile_of(
        [
            event('aten::conv2d', 0, 900),
            event('cudaLaunchKernel', 0, 5),
            event('cudaGraphLaunch', 10, 20),
            event('cudaGraphLaunch', 500, 510),
            event('Optimizer.step', 100, 900, CUDA, is_user_annotation=True),
            event('conv', 100, 300, CUDA),
            # On another stream at the same time.
            event('add', 250, 350, CUDA),
            event('conv', 600, 800, CUDA),
        ]
    ).read(steps=2, milliseconds=0.5)
    assert measured['kernel_ms'] == pytest.approx((250 + 200) / 2 / 1000, abs=1e-3)
    assert measured['busy'] == pytest.approx(0.45)
    assert (measured['kernels'], measured['launches'], measured['graph_launches']) == (1.5, 0.5, 1.0)
    assert [(cost['name'], cost['ms'], cost['count'], cost['share']) for cost in measured['top']] == [
        ('conv', 0.2, 1.0, 0.8),
        ('add', 0.05, 0.5, 0.2),
    ]


def test_only_the_ten_most_expensive_kernels_are_listed() -> None:
    top = top_costs([(f'kernel {n}', 1000.0 * n, 1) for n in range(15)], steps=1)
    assert [cost['ms'] for cost in top] == list(range(14, 4, -1))


def test_a_profile_of_the_cpu_names_its_operators() -> None:
    matrix = torch.rand(64, 64)
    profile = Profile(CPU)
    profile.start()
    for _ in range(4):
        matrix @ matrix
    profile.stop()
    measured = profile.read(steps=2, milliseconds=1.0)
    [product] = [cost for cost in measured['top'] if cost['name'] == 'aten::mm']
    assert product['count'] == 2
    assert (measured['busy'], measured['launches'], measured['graph_launches']) == (None, None, None)
