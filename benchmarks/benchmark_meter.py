# SPDX-License-Identifier: Apache-2.0
"""What a benchmark reads of its device: wall time, peak memory, utilization, and what the steps are made of.

Times are taken with the device at rest before and after. Whether a step is a CUDA graph is not asked of the code that
captures it but counted by the profiler: a replayed graph is one launch by the host, an eager step hundreds of them.
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
"""Kernels that a profile names."""
NAME_LENGTH = 120
"""Characters of a kernel's name that are kept: templates go on for pages."""


def middle(values: Sequence[float], digits: int = 4) -> tuple[float, list[float]]:
    """Median and the lowest and highest of repeated measurements, rounded.

    Example:
        >>> middle([3.0, 1.0, 2.0])
        (2.0, [1.0, 3.0])
    """
    return round(statistics.median(values), digits), [round(value, digits) for value in (min(values), max(values))]


class Stopwatch:
    """Takes the time of what lies between two laps, each of which waits for the device.

    Args:
        device: The device that works.

    Attributes:
        utilization: Percent of the time in which a kernel ran, as the driver (NVML) said at the end of each lap; empty
            where it is not to be asked: without a GPU or without ``nvidia-ml-py``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.utilization: list[int] = []
        self._since = 0.0
        self._may_ask = device.type == 'cuda'

    def start(self) -> None:
        """Start, or start again."""
        self._wait()
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        self._wait()
        seconds = time.perf_counter() - self._since
        self._ask_driver()
        # Asking takes time of its own.
        self._since = time.perf_counter()
        return seconds

    @property
    def mean_utilization(self) -> float | None:
        """Mean of :attr:`utilization`, in percent."""
        return round(statistics.fmean(self.utilization), 1) if self.utilization else None

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def _ask_driver(self) -> None:
        if not self._may_ask:
            return
        try:
            self.utilization.append(torch.cuda.utilization(self.device))
        except Exception:
            # The package may be missing, and containers and shared devices refuse, each with an error of its own. The
            # profile says how busy the device was.
            self._may_ask = False


class PeakMemory:
    """Peak memory of a GPU above what was in use when this was made; None throughout on a CPU.

    Args:
        device: Where memory is allocated.
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
        """Return the peaks so far in GiB: what tensors held, and what PyTorch had reserved for them."""
        if self.device.type != 'cuda':
            return dict(peak_memory_gib=None, peak_reserved_gib=None)
        allocated = torch.cuda.max_memory_allocated(self.device) - self._allocated
        reserved = torch.cuda.max_memory_reserved(self.device) - self._reserved
        return dict(peak_memory_gib=round(allocated / 2**30, 3), peak_reserved_gib=round(reserved / 2**30, 3))


class Profile:
    """Some steps under PyTorch's profiler.

    Args:
        device: Whose kernels are looked at: those of a GPU, or the operators of the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == 'cuda'
        activity = torch.profiler.ProfilerActivity
        # Launches are recorded with the kernels; a GPU's operators, many times as many, nobody reads.
        self._profiler = torch.profiler.profile(activities=[activity.CUDA if self.on_cuda else activity.CPU])

    def start(self) -> None:
        """Begin to record."""
        self._profiler.start()

    def stop(self) -> None:
        """Stop recording; the device has to be at rest."""
        self._profiler.stop()

    def read(self, steps: int, milliseconds: float) -> dict[str, Any]:
        """Say what the recorded steps were made of.

        Args:
            steps: How many were recorded.
            milliseconds: What one takes when nothing is recorded.

        Returns:
            Of one step: ``kernel_ms``, in which at least one kernel ran; their number ``kernels``; ``busy``, the share
            of the step that these milliseconds are, ``launches`` of single kernels and ``graph_launches`` by the host
            (all three None on a CPU, whose operators the profiler slows down); and ``top``, the dearest kernels with
            their share of the time of all.
        """
        counted: tuple[int, int] | None = None
        if self.on_cuda:
            events: Any = self._profiler.events()
            kernels = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in events
                if event.device_type == torch.autograd.DeviceType.CUDA
                # A named range that spans kernels is none.
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
    """Length of the union of intervals (start, end): what runs at once on several streams counts once.

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
    """How often the host launched a kernel, and a graph, among the names of a profile's events.

    Example:
        >>> count_launches(['aten::add', 'cudaLaunchKernel', 'cuLaunchKernelEx', 'cudaGraphLaunch'])
        (2, 1)
    """
    calls = list(names)
    kernels = sum(name.startswith(('cudaLaunch', 'cuLaunch')) for name in calls)
    return kernels, sum(name.startswith(('cudaGraphLaunch', 'cuGraphLaunch')) for name in calls)


def top_costs(costs: Iterable[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Join costs of one name and return the dearest.

    Args:
        costs: Name, microseconds and number of calls; names may repeat.
        steps: That these are of.

    Returns:
        At most :data:`TOP` entries by falling time: ``name``, ``ms`` and ``count`` of one step, and ``share`` of all.
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
    """Name of a GPU as the driver gives it, or the CPU with the number of threads that PyTorch uses."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f'CPU ({platform.machine()}), {threads} thread{"s" * (threads > 1)}'


def describe_versions(device: torch.device) -> dict[str, str]:
    """Versions of what a time depends on."""
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
