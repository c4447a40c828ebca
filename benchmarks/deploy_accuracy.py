# SPDX-License-Identifier: Apache-2.0
"""Measure the AP of exported students, and of other tools' post-training quantization, on YOLOv5-n.

    python benchmarks/deploy_accuracy.py --students work_dirs/students --images work_dirs/synthetic

Each evaluation is kept as one file in ``benchmarks/results/deploy`` and skipped if its file exists. The evaluation is
that of ``python -m mmzsq.test``.

``--students`` holds ``yolov5n_BITS.pth``, checkpoints of ``python -m mmzsq.train configs/zsq/yolov5-n_BITS.py``.
They are evaluated in PyTorch, OpenVINO and ONNX Runtime. ``--images`` is a synthetic set that
``python -m mmzsq.generate CONFIG --format npy`` wrote. NNCF and ``onnxruntime.quantization`` calibrate on it, on noise,
on procedural pictures, and on the first 32 and 300 images of train2017. Their graphs end at the raw maps of the head,
because 8-bit grids would destroy decoded boxes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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
    evaluate,
    load_config,
    noise_images,
    quantize_with_nncf,
    quantize_with_onnxruntime,
    write_float_files,
    write_result,
)
from deploy_sessions import BoundSession
from numpy.lib.format import open_memmap

from mmzsq.datasets.set_formats import Preprocessing
from mmzsq.deploy import detector_of, export
from mmzsq.deploy.heads import unflatten
from mmzsq.deploy.predictor import run_images
from mmzsq.errors import UserError
from mmzsq.image_detector import pipelines_of
from mmzsq.synthesis.procedural import draw_pictures, picture_seed

BITS = ('w8a8', 'w6a6', 'w4a8', 'w4a4')
TARGETS = {'w8a8-outputs': 'onnxruntime', 'w8a8-tensorrt': 'tensorrt'}
"""Students trained for a target, ``zsq.quantizer.target``."""
ENGINES = ('torch', 'openvino', 'onnxruntime')
SIZE = (640, 640)
SOURCES = ('noise', 'procedural', 'real32', 'real300', 'synthetic')
NOISE_IMAGES = 32
PROCEDURAL_IMAGES = 64
TOOLS = {'nncf': 'openvino', 'onnxruntime_static': 'onnxruntime'}
"""Tools, and the engine that each one's file is evaluated in."""
CONFIG = 'configs/zsq/yolov5-n_{}.py'


@dataclass(frozen=True)
class Evaluation:
    """One AP to measure.

    Attributes:
        table: ``'accuracy'`` or ``'calibration'``.
        what: ``'float'``, bits, or a tool.
        engine: One of :data:`ENGINES`.
        source: Images that a tool calibrates on, else None.
    """

    table: str
    what: str
    engine: str
    source: str | None = None

    @property
    def name(self) -> str:
        """Stem of its file."""
        return '_'.join([self.table, self.what, self.source or self.engine])


EVALUATIONS = (
    *(Evaluation('accuracy', what, engine) for what in ('float', *BITS, 'w8a8-outputs') for engine in ENGINES),
    # TensorRT is not run here.
    Evaluation('accuracy', 'w8a8-tensorrt', 'torch'),
    *(Evaluation('calibration', tool, engine, source) for source in SOURCES for tool, engine in TOOLS.items()),
)


class Bench:
    """Builds what is evaluated, and keeps the files in a folder.

    Args:
        teacher: Checkpoint of the float detector.
        students: Folder of ``yolov5n_BITS.pth``.
        images: Synthetic set in the layout ``npy``.
        files: Folder for exported files.
        nncf_python: Interpreter of an environment with NNCF.
        threads: Number of threads of the runtimes.
    """

    def __init__(
        self,
        teacher: Path | None,
        students: Path | None,
        images: Path | None,
        files: Path = WORK_DIR,
        nncf_python: Path = NNCF_PYTHON,
        threads: int = 1,
    ) -> None:
        self.config = load_config(CONFIG.format('w8a8'))
        self.teacher = Path(self.config.load_from) if teacher is None else teacher
        self.students = students
        self.images = images
        self.files = files
        self.nncf_python = nncf_python
        self.threads = threads

    def detector(self, case: Evaluation) -> tuple[Any, dict[str, Any]]:
        """Return the detector of an evaluation, and entries for its result.

        Raises:
            UserError: If a checkpoint, a set or a tool is missing.
        """
        if case.table == 'calibration':
            return self._calibrated(case)
        if case.engine == 'torch':
            return (build_float(self.config, self._teacher()) if case.what == 'float' else self._student(case.what)), {}
        if case.what == 'float':
            return self._raw(self._float_file(), case.engine), {}
        path = self.files / f'yolov5n_{case.what}.{case.engine}.onnx'
        export(self._student(case.what), path, case.engine, SIZE)
        return detector_of(path, self.config.model, case.engine, self.threads), {}

    def _student(self, bits: str) -> Any:
        if self.students is None:
            raise UserError('give the trained students with --students')
        options = {'zsq.quantizer.target': TARGETS[bits]} if bits in TARGETS else {}
        config = load_config(CONFIG.format(bits.partition('-')[0]), options)
        return build_student(config, self.students / f'yolov5n_{bits}.pth')

    def _teacher(self) -> Path:
        if not self.teacher.is_file():
            raise UserError(f'{self.teacher} does not exist: give the weights of YOLOv5-n with --teacher')
        return self.teacher

    def _float_file(self) -> Path:
        folder = self.files / 'yolov5n_float'
        if not (folder / 'detector.onnx').is_file():
            detector = build_float(self.config, self._teacher())
            like = folder / 'metadata.onnx'
            export(build_student(self.config, None, detector), like, size=SIZE, raw=True)
            write_float_files(detector, like, folder, SIZE)
        return folder / 'detector.onnx'

    def _raw(self, path: Path, engine: str) -> Any:
        return detector_of(path, self.config.model, engine, self.threads)

    def _calibrated(self, case: Evaluation) -> tuple[Any, dict[str, Any]]:
        assert case.source is not None
        model = self._float_file()
        inputs = self.inputs(case.source)
        count = len(np.load(inputs, mmap_mode='r'))
        suffix = 'xml' if case.what == 'nncf' else 'onnx'
        out = self.files / f'{case.what}_{case.source}.{suffix}'
        start = time.perf_counter()
        if case.what == 'nncf':
            quantize_with_nncf(model, inputs, out, self.nncf_python)
        else:
            quantize_with_onnxruntime(model, np.load(inputs, mmap_mode='r'), out)
        entries = dict(calibration_images=count, quantization_seconds=round(time.perf_counter() - start, 1))
        detector = self._raw(model if case.what == 'nncf' else out, case.engine)
        if case.what == 'nncf':
            self._replace_network(detector, model, out)
        return detector, entries

    def _replace_network(self, detector: Any, model: Path, path: Path) -> None:
        """Let a detector that runs the float file run another tool's file of the same graph."""
        session = _RawSession(model, path, self.threads)
        structure = json.loads(session.metadata['structure'])
        detector.bbox_head.forward = lambda images: unflatten(structure, run_images(session, images))  # type: ignore[arg-type]

    def inputs(self, source: str) -> Path:
        """Write network inputs as ``.npy``, (N, 3, H, W) float32, if they are not there."""
        path = self.files / f'inputs_{source}.npy'
        if path.is_file():
            return path
        count, images = self._source(source)
        self.files.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        stacked = open_memmap(part, mode='w+', dtype=np.float32, shape=(count, 3, *SIZE))
        for index, image in enumerate(images):
            stacked[index] = image
        stacked.flush()
        part.replace(path)
        return path

    def _source(self, source: str) -> tuple[int, Iterator[np.ndarray]]:
        preprocessing = Preprocessing.from_config(self.config.model.data_preprocessor)
        if source == 'noise':
            noise = noise_images(NOISE_IMAGES, SIZE).transpose(0, 2, 3, 1)
            return NOISE_IMAGES, (preprocessing(image) for image in noise)
        if source == 'procedural':
            seeds = [picture_seed(0, index) for index in range(PROCEDURAL_IMAGES)]
            return PROCEDURAL_IMAGES, (preprocessing(picture) for picture in draw_pictures(seeds, *SIZE))
        if source == 'synthetic':
            if self.images is None or not (self.images / 'images.npy').is_file():
                raise UserError('give a set written by `python -m mmzsq.generate CONFIG --format npy` with --images')
            synthetic = np.load(self.images / 'images.npy', mmap_mode='r')
            return len(synthetic), (preprocessing(image) for image in synthetic)
        count = int(source.removeprefix('real'))
        folder = Path(self.config.test_dataloader.dataset.data_root) / 'train2017'
        paths = sorted(folder.glob('*.jpg'))[:count]
        if len(paths) < count:
            raise UserError(f'{folder} holds {len(paths)} images, but {count} are needed')
        load, _ = pipelines_of(self.config)
        preprocessor = build_float(self.config, self._teacher()).data_preprocessor
        return count, (_prepared(load, preprocessor, path) for path in paths)


class _RawSession:
    """A file of NNCF with the interface that :func:`~mmzsq.deploy.predictor.run_images` needs."""

    def __init__(self, model: Path, path: Path, threads: int) -> None:
        self.metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
        self.input_shape = [1, 3, *SIZE]
        self._input = np.zeros(self.input_shape, np.float32)
        self._session = BoundSession(path, 'openvino', threads, self._input)

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        self._input[...] = images
        self._session.run()
        return self._session.outputs()


def _prepared(load: Callable[[Any], Any], preprocessor: Any, path: Path) -> np.ndarray:
    """Load a real image as in a test: (3, H, W) float32, normalized."""
    data = load(dict(img_path=str(path), img_id=0))
    prepared = preprocessor(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]), False)
    array: np.ndarray = prepared['inputs'][0].numpy()
    return array


def run(bench: Bench, cases: list[Evaluation], out: Path, command: str, limit: int | None = None) -> list[str]:
    """Evaluate and write one file for each case.

    Args:
        bench: Builds the detectors.
        cases: In order.
        out: Folder; cases that have a file there are skipped.
        command: Goes into the files.
        limit: As of :func:`~deploy_models.evaluate`.

    Returns:
        Names of the cases that could not be evaluated.
    """
    missed = []
    for case in cases:
        path = out / f'{case.name}.json'
        if path.is_file():
            continue
        start = time.perf_counter()
        try:
            detector, entries = bench.detector(case)
        except UserError as error:
            _log(f'{case.name}: skipped: {error}')
            missed.append(case.name)
            continue
        metrics = evaluate(detector, bench.config, limit)
        versions = describe_versions(bench.nncf_python if case.what == 'nncf' else None)
        result = dict(
            table=case.table,
            what=case.what,
            engine=case.engine,
            source=case.source,
            **entries,
            AP=metrics['coco/bbox_mAP'],
            AP50=metrics['coco/bbox_mAP_50'],
            evaluation_images=metrics['images'],
            seconds=round(time.perf_counter() - start, 1),
            command=command,
            cpu=describe_cpu(),
            versions=versions,
        )
        write_result(path, result)
        _log(f'{case.name}: AP {100 * result["AP"]:.2f}, {result["seconds"]:.0f} s')
    return missed


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    add = partial(parser.add_argument, type=Path, metavar='PATH')
    add('--students', help='folder of yolov5n_BITS.pth')
    add('--images', help='synthetic set in the layout npy')
    add('--teacher', help="float checkpoint (default: the config's load_from)")
    add('--files', default=WORK_DIR, help=f'folder for exported files (default: {WORK_DIR})')
    add('--nncf-python', default=NNCF_PYTHON, help=f'Python with nncf (default: {NNCF_PYTHON})')
    add('--out', default=ROOT / RESULTS, help=f'folder of results (default: {RESULTS})')
    parser.add_argument('--only', nargs='+', metavar='TEXT', help='evaluate cases whose names contain one of these')
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch and the runtimes (default: 1)')
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    bench = Bench(args.teacher, args.students, args.images, args.files, args.nncf_python, args.threads)
    cases = [case for case in EVALUATIONS if not args.only or any(text in case.name for text in args.only)]
    missed = run(bench, cases, args.out, command_line(arguments))
    if missed:
        raise SystemExit(f'error: {len(missed)} of {len(cases)} cases were not evaluated: {", ".join(missed)}')


def _log(text: str) -> None:
    sys.stdout.write(f'{text}\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
