# SPDX-License-Identifier: Apache-2.0
"""Measure the latency of exported detectors on this CPU, beside float and other tools' 8-bit files.

    python benchmarks/deploy_speed.py --students work_dirs/students
    python benchmarks/deploy_speed.py --quick

All variants of a detector are open in one process and run in turn, so that changes of the CPU's clock affect all of
them. Batch 1, raw maps as outputs, input and output stay in place. Tables hold medians; ratios are medians over rounds.

The first call writes the files of each detector into ``--files``, which takes several minutes (``--prepare`` does
nothing else). Later calls measure: about 5 minutes for all detectors. A detector whose result exists in ``--out`` is
skipped. ``--quick`` measures YOLOv5-n with one thread in about a minute and writes nothing.

YOLOv5-n has the weights of the config and trained students, if they are given. Other detectors have random weights,
which does not change their time. Mask R-CNN is measured in two of its three graphs: backbone, neck and RPN on one
image, and the box head on 1000 regions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy_models import (
    NNCF_PYTHON,
    RESULTS,
    ROOT,
    WORK_DIR,
    build_float,
    build_student,
    command_line,
    describe_cpu,
    describe_versions,
    load_config,
    quantize_with_nncf,
    quantize_with_onnxruntime,
    write_float_files,
    write_result,
)
from deploy_sessions import BoundSession
from markdown_pages import markdown_table
from mmengine.config import DictAction
from speed_cases import RTMDET_TINY_OPTIONS

from mmzsq.deploy import export
from mmzsq.errors import UserError

CALIBRATION_IMAGES = 4
"""Images of noise for other tools' files, of which the time alone matters."""
REGIONS = 1000
WARM_UP = 2
MINIMUM_RUNS = 5


@dataclass(frozen=True)
class Detector:
    """A detector to measure.

    Attributes:
        name: Stem of its files.
        title: In tables.
        config: Path in the repository.
        options: Values that override the config, as ``KEY=VALUE``.
        size: Height and width of the image, in pixels.
        graphs: Titles of the graphs to measure by their part.
        trained: Pattern of the names of its trained students; empty: random weights.
    """

    name: str
    title: str
    config: str
    options: tuple[str, ...] = ()
    size: tuple[int, int] = (640, 640)
    graphs: tuple[tuple[str, str], ...] = (('detector', ''),)
    trained: str = ''


@dataclass(frozen=True)
class Variant:
    """A file in a runtime.

    Attributes:
        name: In results.
        title: In tables.
        runtime: ``'openvino'`` or ``'onnxruntime'``.
        file: Which file: ``'float'``, ``'nncf'``, ``'static'``, or bits.
        precision: OpenVINO's precision of what is not in integers.
        outputs: Whether convolution outputs have trained grids, too.
    """

    name: str
    title: str
    runtime: str
    file: str
    precision: str = 'f32'
    outputs: bool = False


DETECTORS = (
    Detector('yolov5-n', 'YOLOv5-n', 'configs/zsq/yolov5-n_w8a8.py', trained='yolov5n_{}.pth'),
    Detector('yolo11-n', 'YOLO11-n', 'configs/zsq/yolo11-n_w8a8.py'),
    Detector('rtmdet-tiny', 'RTMDet-tiny', 'configs/zsq/rtmdet-s_w8a8.py', options=RTMDET_TINY_OPTIONS),
    Detector(
        'mask-rcnn_r50',
        'Mask R-CNN R50',
        'configs/zsq/mask-rcnn_r50_w8a8.py',
        graphs=(('features', 'backbone, neck, RPN'), ('box_head', f'box head, {REGIONS} regions')),
    ),
)
VARIANTS = (
    Variant('openvino_float', 'float, f32', 'openvino', 'float'),
    Variant('openvino_bf16', 'float, bf16 (default of OpenVINO)', 'openvino', 'float', 'bf16'),
    Variant('openvino_w8a8', 'ours, W8A8', 'openvino', 'w8a8'),
    Variant('openvino_w8a8_bf16', 'ours, W8A8, bf16 between', 'openvino', 'w8a8', 'bf16'),
    Variant('openvino_w4a8', 'ours, W4A8 in 8-bit containers', 'openvino', 'w4a8'),
    Variant('openvino_w4a4', 'ours, W4A4 in 8-bit containers', 'openvino', 'w4a4'),
    Variant('openvino_nncf', 'NNCF, W8A8', 'openvino', 'nncf'),
    Variant('onnxruntime_float', 'float', 'onnxruntime', 'float'),
    Variant('onnxruntime_w8a8', 'ours, W8A8', 'onnxruntime', 'w8a8'),
    Variant('onnxruntime_w8a8_outputs', 'ours, W8A8, outputs quantized', 'onnxruntime', 'w8a8', outputs=True),
    Variant('onnxruntime_static', 'quantize_static, W8A8', 'onnxruntime', 'static'),
)
BASELINES = {'openvino': 'openvino_float', 'onnxruntime': 'onnxruntime_float'}


@dataclass(frozen=True)
class Sources:
    """Where weights and files come from.

    Attributes:
        files: Folder for exported files.
        teacher: Float checkpoint of a detector with trained students; None uses that of its config.
        students: Folder of trained students, or None.
        nncf_python: Interpreter of an environment with NNCF.
    """

    files: Path
    teacher: Path | None = None
    students: Path | None = None
    nncf_python: Path = NNCF_PYTHON


def prepare(detector: Detector, sources: Sources, log: Any) -> dict[str, dict[str, Path]]:
    """Write the files of a detector that are not there yet.

    Returns:
        Path of each graph by the name of its part, by the name of the variant. Variants that cannot be built are
        left out with a message.
    """
    folder = sources.files / detector.name
    files: dict[str, dict[str, Path]] = {}
    builder = _Builder(detector, sources, folder)
    for variant in VARIANTS:
        paths = {part: builder.path(variant, part) for part, _ in detector.graphs}
        missing = [part for part, path in paths.items() if not path.is_file()]
        try:
            if missing:
                start = time.perf_counter()
                builder.build(variant, missing)
                log(f'{detector.title}: {variant.runtime}, {variant.title}: {time.perf_counter() - start:.0f} s')
        except UserError as error:
            log(f'{detector.title}: {variant.runtime}, {variant.title}: left out: {error}')
            continue
        files[variant.name] = paths
    return files


class _Builder:
    """Writes the files of one detector."""

    def __init__(self, detector: Detector, sources: Sources, folder: Path) -> None:
        self.detector = detector
        self.sources = sources
        self.folder = folder
        self._float: Any = None

    def path(self, variant: Variant, part: str) -> Path:
        """Return the path of one graph."""
        if variant.file == 'float':
            return self.folder / 'float' / f'{part}.onnx'
        if variant.file in ('nncf', 'static'):
            return self.folder / variant.file / f'{part}.{"xml" if variant.file == "nncf" else "onnx"}'
        main = self._main(variant)
        return main if part in ('detector', 'features') else main.with_name(f'{main.stem}.{part}.onnx')

    def build(self, variant: Variant, parts: Sequence[str]) -> None:
        """Write the graphs of a variant."""
        if variant.file == 'float':
            like = self._main(next(other for other in VARIANTS if other.name == 'openvino_w8a8'))
            if not like.is_file():
                self._export('w8a8', 'openvino', False, like)
            write_float_files(self._float_detector(), like, self.folder / 'float', self.detector.size)
        elif variant.file in ('nncf', 'static'):
            for part in parts:
                self._quantize(variant, part)
        else:
            self._export(variant.file, variant.runtime, variant.outputs, self._main(variant))

    def _main(self, variant: Variant) -> Path:
        outputs = '_outputs' if variant.outputs else ''
        return self.folder / f'{variant.file}{outputs}.{variant.runtime}.onnx'

    def _export(self, bits: str, target: str, outputs: bool, path: Path) -> None:
        options = [f'zsq.quantizer.w_bits={bits[1]}', f'zsq.quantizer.a_bits={bits[3]}']
        checkpoint = None
        if outputs:
            options.append('zsq.quantizer.outputs=8')
        elif self.detector.trained and self.sources.students is not None:
            checkpoint = self.sources.students / self.detector.trained.format(bits)
        cfg = self._config(options)
        student = build_student(cfg, checkpoint, None if checkpoint else self._float_detector())
        export(student, path, target, self.detector.size, raw=True)

    def _quantize(self, variant: Variant, part: str) -> None:
        model = self.folder / 'float' / f'{part}.onnx'
        if not model.is_file():
            raise UserError(f'{model} is missing, which it starts from')
        inputs = np.stack([example_input(part, self.detector.size, seed) for seed in range(CALIBRATION_IMAGES)])
        out = self.path(variant, part)
        if variant.file == 'nncf':
            stored = self.folder / f'inputs_{part}.npy'
            np.save(stored, inputs)
            quantize_with_nncf(model, stored, out, self.sources.nncf_python)
        else:
            quantize_with_onnxruntime(model, inputs, out)

    def _config(self, options: Sequence[str] = ()) -> Any:
        pairs = (option.split('=', 1) for option in (*self.detector.options, *options))
        return load_config(self.detector.config, {key: DictAction._parse_iterable(value) for key, value in pairs})

    def _float_detector(self) -> Any:
        if self._float is None:
            cfg = self._config()
            checkpoint = None
            if self.detector.trained:
                given = Path(cfg.load_from) if self.sources.teacher is None else self.sources.teacher
                checkpoint = given if given.is_file() else None
            self._float = build_float(cfg, checkpoint)
        return self._float


def example_input(part: str, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Return noise for one graph, without the batch: an image, or the features of one region."""
    generator = np.random.default_rng(seed)
    shape = (3, *size) if part in ('detector', 'features') else (256, 7, 7)
    return generator.random(shape, dtype=np.float32)


def network_input(part: str, size: tuple[int, int]) -> np.ndarray:
    """Return the input that a graph is timed on: one image, or 1000 regions."""
    if part in ('detector', 'features'):
        return example_input(part, size)[None]
    return np.random.default_rng(0).random((REGIONS, 256, 7, 7), dtype=np.float32)


def measure(paths: Mapping[str, Path], inputs: np.ndarray, threads: int, runs: int, seconds: float) -> dict[str, Any]:
    """Time variants in turn.

    Args:
        paths: File of each variant by its name.
        inputs: Input of all of them.
        threads: Number of threads.
        runs: Number of rounds.
        seconds: Stop after this time, but not before :data:`MINIMUM_RUNS` rounds.

    Returns:
        ``ms`` of each round by variant.
    """
    variants = {variant.name: variant for variant in VARIANTS}
    sessions = {
        name: BoundSession(path, variants[name].runtime, threads, inputs, variants[name].precision)
        for name, path in paths.items()
    }
    for session in sessions.values():
        for _ in range(WARM_UP):
            session.run()
    times: dict[str, list[float]] = {name: [] for name in sessions}
    started = time.perf_counter()
    for index in range(runs):
        if index >= MINIMUM_RUNS and time.perf_counter() - started > seconds:
            break
        order = list(sessions) if index % 2 == 0 else list(reversed(sessions))
        for name in order:
            start = time.perf_counter()
            sessions[name].run()
            times[name].append(round(1000 * (time.perf_counter() - start), 3))
    return dict(ms=times)


def measure_detector(
    detector: Detector,
    files: Mapping[str, Mapping[str, Path]],
    threads: Sequence[int],
    runs: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Time all graphs of a detector.

    Returns:
        One entry for each graph and number of threads: ``graph``, ``title``, ``threads``, ``ms``.
    """
    found = []
    for part, title in detector.graphs:
        inputs = network_input(part, detector.size)
        for count in threads:
            paths = {name: parts[part] for name, parts in files.items()}
            times = measure(paths, inputs, count, runs, seconds)
            found.append(dict(graph=part, title=title, threads=count, **times))
    return found


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Return how many times faster one variant is than another: the median over rounds."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def speed_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format results as one Markdown table.

    Args:
        results: Contents of the files of detectors.
    """
    threads = sorted({entry['threads'] for result in results for entry in result['graphs']})
    plural = {count: f'{count} thread{"s" * (count > 1)}' for count in threads}
    header = ['detector', 'runtime', 'file']
    for count in threads:
        header += [f'ms, {plural[count]}', 'times faster']
    rows = []
    for result in results:
        for part in dict.fromkeys(entry['graph'] for entry in result['graphs']):
            entries = {entry['threads']: entry for entry in result['graphs'] if entry['graph'] == part}
            title = next(iter(entries.values()))['title']
            name = f'{result["title"]}, {title}' if title else result['title']
            for variant in VARIANTS:
                cells = []
                for count in threads:
                    times = entries[count]['ms'] if count in entries else {}
                    cells += _cells(times, variant)
                if any(cells):
                    rows.append([name, RUNTIME_TITLES[variant.runtime], variant.title, *cells])
    return markdown_table(header, rows)


RUNTIME_TITLES = dict(openvino='OpenVINO', onnxruntime='ONNX Runtime')


def _cells(times: Mapping[str, Sequence[float]], variant: Variant) -> list[str]:
    if variant.name not in times:
        return ['', '']
    baseline = BASELINES[variant.runtime]
    faster = f'{ratio(times, baseline, variant.name):.2f}' if baseline in times else ''
    return [f'{statistics.median(times[variant.name]):.1f}', faster]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, prepare, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    names = [detector.name for detector in DETECTORS]
    add = partial(parser.add_argument, type=Path, metavar='PATH')
    add('--students', help='folder of yolov5n_BITS.pth (default: untrained)')
    add('--teacher', help="float checkpoint of YOLOv5-n (default: the config's load_from)")
    add('--files', default=WORK_DIR / 'speed', help=f'folder for exported files (default: {WORK_DIR}/speed)')
    add('--nncf-python', default=NNCF_PYTHON, help=f'Python with nncf (default: {NNCF_PYTHON})')
    add('--out', default=ROOT / RESULTS, help=f'folder of results (default: {RESULTS})')
    parser.add_argument('--detectors', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2], help='(default: 1 2)')
    parser.add_argument('--runs', type=int, default=31, help='rounds (default: 31)')
    parser.add_argument(
        '--seconds', type=float, default=20, help='limit for the rounds of one graph and thread count (default: 20)'
    )
    parser.add_argument('--prepare', action='store_true', help='write files and measure nothing')
    parser.add_argument('--quick', action='store_true', help='a look at YOLOv5-n in about a minute; writes no result')
    args = parser.parse_args(arguments)
    sources = Sources(args.files, args.teacher, args.students, args.nncf_python)
    torch.set_num_threads(max(args.threads))
    if args.quick:
        detector = DETECTORS[0]
        found = measure_detector(detector, prepare(detector, sources, _log), [1], min(args.runs, 7), args.seconds)
        _log(speed_table([dict(title=detector.title, graphs=found)]))
        return
    for detector in DETECTORS:
        path = args.out / f'speed_{detector.name}.json'
        if detector.name not in args.detectors:
            continue
        if path.is_file() and not args.prepare:
            _log(f'{detector.title}: {path} exists, skipped')
            continue
        files = prepare(detector, sources, _log)
        if args.prepare:
            continue
        start = time.perf_counter()
        result = dict(
            name=detector.name,
            title=detector.title,
            size=detector.size,
            graphs=measure_detector(detector, files, args.threads, args.runs, args.seconds),
            command=command_line(arguments),
            cpu=describe_cpu(),
            versions=describe_versions(args.nncf_python),
        )
        write_result(path, result)
        _log(f'{detector.title}: {time.perf_counter() - start:.0f} s\n{speed_table([json.loads(json.dumps(result))])}')


def _log(text: str) -> None:
    sys.stdout.write(f'{text}\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
