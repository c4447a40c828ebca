# SPDX-License-Identifier: Apache-2.0
"""Measure wall time, peak memory, utilization and kernels of a device.

The device is idle before and after a timed block. The profiler counts launches to tell whether a step is a CUDA graph,
independent of the code that captures it: a replayed graph is one launch by the host, an eager step hundreds.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import mmdet
import mmengine
import torch

from mmzsq.version import __version__

TOP = 10
"""Number of kernels that a profile lists."""
NAME_LENGTH = 120
"""Longest name of a kernel in characters; names of templates are truncated."""


def middle(values: Sequence[float], digits: int = 4) -> tuple[float, list[float]]:
    """Return the median and (lowest, highest) of repeated measurements, rounded.

    Example:
        >>> middle([3.0, 1.0, 2.0])
        (2.0, [1.0, 3.0])
    """
    return round(statistics.median(values), digits), [round(value, digits) for value in (min(values), max(values))]


class Stopwatch:
    """Measures the time between laps; each lap waits for the device.

    Args:
        device: The device to wait for.

    Attributes:
        utilization: Utilization in percent that the driver (NVML) reports at the end of each lap; empty without a GPU
            or without ``nvidia-ml-py``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.utilization: list[int] = []
        self._since = 0.0
        self._may_query = device.type == 'cuda'

    def start(self) -> None:
        """Start or restart."""
        self._wait()
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or start."""
        self._wait()
        seconds = time.perf_counter() - self._since
        self._query_driver()
        # The query takes time, which the next lap must not include.
        self._since = time.perf_counter()
        return seconds

    @property
    def mean_utilization(self) -> float | None:
        """Mean of :attr:`utilization` in percent; None without values."""
        return round(statistics.fmean(self.utilization), 1) if self.utilization else None

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def _query_driver(self) -> None:
        if not self._may_query:
            return
        try:
            self.utilization.append(torch.cuda.utilization(self.device))
        except Exception:
            # A missing package, containers and shared devices raise different errors. The profile measures how busy the
            # device is, too.
            self._may_query = False


class PeakMemory:
    """Peak memory of a GPU above the usage at construction; all values are None on a CPU.

    Args:
        device: Device to measure.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
            self._reserved = torch.cuda.memory_reserved(device)

    def read(self) -> dict[str, float | None]:
        """Return the peaks in GiB: memory allocated by tensors, and memory reserved by PyTorch."""
        if self.device.type != 'cuda':
            return dict(peak_memory_gib=None, peak_reserved_gib=None)
        allocated = torch.cuda.max_memory_allocated(self.device) - self._allocated
        reserved = torch.cuda.max_memory_reserved(self.device) - self._reserved
        return dict(peak_memory_gib=round(allocated / 2**30, 3), peak_reserved_gib=round(reserved / 2**30, 3))


class Profile:
    """A profile of a few steps by PyTorch's profiler.

    Args:
        device: Device to profile: kernels of a GPU, or operators of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == 'cuda'
        activity = torch.profiler.ProfilerActivity
        # CUDA activities include the launches. The operators on the host are not needed.
        self._profiler = torch.profiler.profile(activities=[activity.CUDA if self.on_cuda else activity.CPU])

    def start(self) -> None:
        """Start recording."""
        self._profiler.start()

    def stop(self) -> None:
        """Stop recording; the device must be idle."""
        self._profiler.stop()

    def read(self, steps: int, milliseconds: float) -> dict[str, Any]:
        """Summarize the recorded steps.

        Args:
            steps: Number of recorded steps.
            milliseconds: Time of one step without the profiler.

        Returns:
            Per step: ``kernel_ms``, the time in which at least one kernel ran; ``kernels``, their number; ``busy``, the
            share of ``kernel_ms`` in the step; ``launches`` of single kernels and ``graph_launches`` by the host; and
            ``top``, the most expensive kernels with their share of the total time. ``busy`` and both kinds of launches
            are None on a CPU, whose operators the profiler slows down.
        """
        counted: tuple[int, int] | None = None
        if self.on_cuda:
            events: Any = self._profiler.events()
            kernels = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in events
                if event.device_type == torch.autograd.DeviceType.CUDA
                # Named ranges span kernels and are not kernels themselves.
                and not getattr(event, 'is_user_annotation', False)
            ]
            costs = [(name, end - start, 1) for name, start, end in kernels]
            occupied = covered((start, end) for _, start, end in kernels)
            counted = count_launches(event.name for event in events)
        else:
            averages: Any = self._profiler.key_averages()
            costs = [(event.key, event.self_cpu_time_total, event.count) for event in averages]
            occupied = sum(microseconds for _, microseconds, _ in costs)
        kernel_ms = occupied / 1000 / steps
        return dict(
            kernel_ms=round(kernel_ms, 3),
            kernels=round(sum(count for *_, count in costs) / steps, 1),
            busy=round(min(kernel_ms / milliseconds, 1.0), 3) if self.on_cuda else None,
            launches=None if counted is None else round(counted[0] / steps, 1),
            graph_launches=None if counted is None else round(counted[1] / steps, 1),
            top=top_costs(costs, steps),
        )


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end), so that parallel kernels count once.

    Example:
        >>> covered([(0, 2), (5, 6), (1, 3)])
        4.0
    """
    length, reached = 0.0, float('-inf')
    for start, end in sorted(intervals):
        length += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return length


def count_launches(names: Iterable[str]) -> tuple[int, int]:
    """Count launches of kernels and of graphs among the event names of a profile.

    Example:
        >>> count_launches(['aten::add', 'cudaLaunchKernel', 'cuLaunchKernelEx', 'cudaGraphLaunch'])
        (2, 1)
    """
    calls = list(names)
    kernels = sum(name.startswith(('cudaLaunch', 'cuLaunch')) for name in calls)
    return kernels, sum(name.startswith(('cudaGraphLaunch', 'cuGraphLaunch')) for name in calls)


def top_costs(costs: Iterable[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Sum up costs by name and return the largest.

    Args:
        costs: Name, microseconds and number of calls; names may repeat.
        steps: Number of steps that the costs belong to.

    Returns:
        At most :data:`TOP` entries by decreasing time: ``name``, ``ms`` and ``count`` per step, ``share`` of the total.
    """
    microseconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, time_taken, count in costs:
        microseconds[name] += time_taken  # type: ignore[assignment]  # a Counter of floats
        counts[name] += count
    total = sum(microseconds.values()) or 1
    return [
        dict(
            name=name[:NAME_LENGTH],
            ms=round(value / 1000 / steps, 3),
            count=round(counts[name] / steps, 1),
            share=round(value / total, 3),
        )
        for name, value in microseconds.most_common(TOP)
        if value > 0
    ]


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or the type of CPU with the number of PyTorch threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'CPU ({platform.machine()}), {threads} thread{"s" * (threads > 1)}'


def describe_versions(device: torch.device) -> dict[str, str]:
    """Return the versions of the software that times depend on."""
    versions = dict(
        mmzsq=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        mmdet=mmdet.__version__,
        mmengine=mmengine.__version__,
    )
    if device.type == 'cuda':
        versions.update(cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()))
    return versions
