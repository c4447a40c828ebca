# SPDX-License-Identifier: Apache-2.0
"""Speed of an exported detector beside its float network, in one runtime on this CPU.

Both networks are open at once and run in turn, image by image, so that a change of the CPU's clock or of its load
affects both. A pair of runs gives one ratio, and the median of the ratios is reported.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmzsq.deploy.export import DeployReport, unwrap
from mmzsq.deploy.heads import BOX_HEAD, Part, parts_of
from mmzsq.deploy.runtime import Session

PAIRS = 50
"""Pairs of runs that are measured at most."""

MIN_PAIRS = 5
"""Pairs of runs that are measured at least, however long they take."""

SECONDS = 20.0
"""Time after which no pair begins, in seconds."""

WARM_UP = 3
"""Pairs that are not counted: first runs prepare memory."""


@dataclass(frozen=True)
class Speed:
    """Latency of two networks with one image.

    Attributes:
        runtime: The engine.
        float_ms: Median time of the float network, in milliseconds.
        quantized_ms: Median time of the quantized one, in milliseconds.
        ratio: Median of the ratios of both in pairs of runs; above 1 if the quantized network is faster.
        pairs: Number of pairs.
        threads: Threads of the engine; 0 if it decided.
        cpu: Name of the CPU.
        size: Height and width of the image, in pixels.
    """

    runtime: str
    float_ms: float
    quantized_ms: float
    ratio: float
    pairs: int
    threads: int
    cpu: str
    size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        name = dict(openvino='OpenVINO', onnxruntime='ONNX Runtime')[self.runtime]
        change = f'{self.ratio:.2f}x faster' if self.ratio >= 1 else f'{1 / self.ratio:.2f}x slower'
        threads = '' if not self.threads else f', {self.threads} thread{"" if self.threads == 1 else "s"}'
        return (
            f'{name}: float {self.float_ms:.2f} ms, quantized {self.quantized_ms:.2f} ms, {change} (median of '
            f'{self.pairs} alternating pairs, {self.size[0]}x{self.size[1]} pixels{threads}, {self.cpu})'
        )


def measure_speed(
    detector: nn.Module,
    quantized: DeployReport,
    plain: DeployReport,
    runtime: str,
    threads: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Speed:
    """Measure the files of a quantized and of a float detector in alternating pairs.

    The time is that of the networks, without pre- and post-processing. Of a two-stage detector, it is the sum of its
    graphs, with as many regions as ``test_cfg`` allows: ``rpn.max_per_img`` for boxes, ``rcnn.max_per_img`` for masks.

    Args:
        detector: The quantized detector, which defines the inputs of its graphs.
        quantized: The report of its export.
        plain: The report of the float export, with the same sizes and outputs.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        threads: Number of threads; 0 lets the runtime decide.
        on_progress: Called with ``'pairs'``, the number of pairs that are done, and their total number at most.

    Returns:
        Medians.
    """
    parts = parts_of(unwrap(detector), quantized.size, quantized.outputs == 'raw')
    inputs = [_input(detector, part) for part in parts]
    one, other = (
        [Session(Path(report.files[part.name]), runtime, threads) for part in parts] for report in (plain, quantized)
    )
    pairs: list[tuple[float, float]] = []
    on_progress('pairs', 0, PAIRS)
    start = time.perf_counter()
    for index in range(WARM_UP + PAIRS):
        if len(pairs) >= MIN_PAIRS and time.perf_counter() - start > SECONDS:
            break
        pair = _run(one, inputs), _run(other, inputs)
        if index >= WARM_UP:
            pairs.append(pair)
            on_progress('pairs', len(pairs), PAIRS)
    if len(pairs) < PAIRS:
        on_progress('pairs', PAIRS, PAIRS)
    return Speed(
        runtime=runtime,
        float_ms=statistics.median(before for before, _ in pairs),
        quantized_ms=statistics.median(after for _, after in pairs),
        ratio=statistics.median(before / after for before, after in pairs),
        pairs=len(pairs),
        threads=threads,
        cpu=cpu_name(),
        size=quantized.size,
    )


def _input(detector: Any, part: Part) -> np.ndarray:
    """Draw an image, or as many regions as the detector's settings of the test allow."""
    shape = list(part.example.shape)
    if part.input_name == 'regions':
        test_cfg: Any = unwrap(detector).test_cfg
        shape[0] = test_cfg['rpn' if part.name.startswith(BOX_HEAD) else 'rcnn']['max_per_img']
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _run(sessions: Sequence[Session], inputs: Sequence[np.ndarray]) -> float:
    """Return the milliseconds of one run of all graphs."""
    start = time.perf_counter()
    for session, value in zip(sessions, inputs, strict=True):
        session(value)
    return 1000 * (time.perf_counter() - start)


def cpu_name() -> str:
    """Return the name of this machine's CPU."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.machine())
