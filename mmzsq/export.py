# SPDX-License-Identifier: Apache-2.0
"""Export a quantized checkpoint to ONNX, and verify the file.

``python -m mmzsq.export CONFIG CHECKPOINT --target openvino`` needs neither the teacher nor a GPU. With ``--verify N``,
the files are compared with PyTorch in every installed runtime that suits the target, and ``deploy.json`` beside them
holds the numbers of each model in the folder. A file that fails ends the command with exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS, METRICS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger, print_log

from mmzsq import cli
from mmzsq.atomic_files import sha256, to_json, write_atomically
from mmzsq.class_names import check_built_dataset, check_data, choose_classes
from mmzsq.config import compose
from mmzsq.config.compose import class_names
from mmzsq.engine.console import PhaseProgress
from mmzsq.errors import UserError
from mmzsq.pipelines import frame_of
from mmzsq.qat import ZeroShotDetector
from mmzsq.qat.student_checkpoint import load_student
from mmzsq.registry import MODELS
from mmzsq.report import write_report
from mmzsq.report.runs import DEPLOY_FILE, RESULTS_FILE
from mmzsq.synthesis import CalibrationSet
from mmzsq.tasks.detection_task import known_num_classes
from mmzsq.version import __version__

PHASES = dict(graphs='export', layers='verification of layers', detections='verification of detections', pairs='speed')
"""Titles of the phases of export, verification and measurement."""
M_MMAP_THRESHOLD = -3
"""Parameter of glibc's ``mallopt``, from malloc.h."""
LARGE_BLOCK = 2**20
"""Bytes of a block that is returned when it is freed."""


@dataclass
class Student:
    """A quantized detector with what its files say about it.

    Attributes:
        detector: Teacher and student; the teacher is not loaded.
        classes: Class names in the order of the labels, None if nothing names them.
        cfg: The composed config.
    """

    detector: ZeroShotDetector
    classes: Sequence[str] | None
    cfg: Config

    @property
    def pipeline(self) -> list[dict[str, Any]]:
        """The test pipeline, empty if the config has none."""
        return list(((self.cfg.get('test_dataloader') or {}).get('dataset') or {}).get('pipeline') or [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, export, and verify.

    Args:
        arguments: The command line, None: that of the process.
    """
    args = _parse_args(arguments)
    _return_memory()
    # Its import fails with a message if onnx is not installed.
    from mmzsq import deploy
    from mmzsq.deploy.dialects import check_target
    from mmzsq.deploy.export import check_writable

    check_target(args.target)
    runtimes = runtimes_for(args.target) if args.verify else []
    path = output_path(args.out, args.checkpoint, None)
    cfg = cli.load_config(args)
    if path is None:
        path = output_path(args.out, args.checkpoint, cfg.work_dir)
    assert path is not None
    check_writable(path)
    student = load(cfg, args.checkpoint)
    size = image_size(student) if args.size is None else (args.size[0], args.size[1])
    _log(f'size: {size[0]}x{size[1]} pixels (height x width){"" if args.size else ", from the test pipeline"}')
    # A teacher that is missing ends the command before minutes go into the export.
    teacher = student.detector.load_teacher() if args.benchmark else None
    start = time.perf_counter()
    with _progress() as progress:
        report = deploy.export(
            student.detector,
            path,
            args.target,
            size,
            raw=args.raw,
            dynamic_batch=args.dynamic_batch,
            int4=args.int4,
            nms=args.nms,
            exporter=args.exporter,
            classes=student.classes,
            pipeline=student.pipeline,
            on_progress=progress.update,
        )
    for name, file in report.files.items():
        _log(f'{file}: {report.bytes[name] / 1e6:.2f} MB')
    folded = sum(layer.batch_norm == 'folded' for layer in report.layers)
    _log(
        f'{len({layer.layer for layer in report.layers})} quantized layers, {folded} BatchNorms folded, '
        f'{time.perf_counter() - start:.1f} s'
    )
    if args.verify:
        _verify(student, report, runtimes, args, teacher)
    elif path.with_name(DEPLOY_FILE).is_file():
        # Its numbers may be those of the file that was replaced.
        record(path, None)


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = cli.parser('Export a quantized checkpoint to ONNX with its trained integers, and verify the file.')
    options.add_argument('checkpoint', help='path or URL of the .pth or .safetensors that training wrote')
    options.add_argument('--target', default='openvino', help='openvino (default), onnxruntime or tensorrt')
    options.add_argument('--out', metavar='FILE.onnx', help='default: beside the checkpoint, under its name')
    options.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help='size of the images in pixels (default: test pipeline)'
    )
    options.add_argument('--dynamic-batch', action='store_true', help='leave the number of images open')
    options.add_argument(
        '--int4', action='store_true', help='store weights of at most 4 bits as INT4: a smaller file, not a faster one'
    )
    options.add_argument('--raw', action='store_true', help='end a dense detector at the maps of its head')
    options.add_argument('--nms', action='store_true', help='append NonMaxSuppression to a dense detector')
    options.add_argument('--exporter', default='torchscript', help='torchscript (default) or dynamo')
    options.add_argument(
        '--verify',
        type=int,
        default=0,
        metavar='N',
        help='compare the files with PyTorch, and the detections on N synthetic images; writes deploy.json',
    )
    options.add_argument(
        '--ap',
        type=int,
        default=0,
        metavar='N',
        help='with --verify: also compare AP of checkpoint and files on the first N images of the test data',
    )
    options.add_argument(
        '--benchmark',
        action='store_true',
        help='with --verify: also export the teacher as NAME.float.onnx, and compare the speed of both on this CPU',
    )
    args = options.parse_args(arguments)
    for name in ('verify', 'ap'):
        if getattr(args, name) < 0:
            raise UserError(f'--{name} is {getattr(args, name)}, but must be a number of images.')
    if args.ap and not args.verify:
        raise UserError('--ap belongs to --verify: give both, such as --verify 8 --ap 200.')
    if args.benchmark and not args.verify:
        raise UserError('--benchmark belongs to --verify: give both, such as --verify 8 --benchmark.')
    if args.benchmark and args.nms:
        raise UserError('--benchmark compares the networks alone: leave out --nms.')
    if args.benchmark and args.target == 'tensorrt':
        raise UserError(
            '--benchmark measures on this CPU, but TensorRT runs on a GPU: leave it out, or give another --target.'
        )
    return args


def _return_memory() -> None:
    """Let the C library return large blocks to the system when they are freed, if it is glibc.

    It keeps blocks of up to 32 MB otherwise, once one of that size was freed. Activations of large images then fill
    the memory with gaps: Mask R-CNN Swin-S at 1344x1344 pixels takes twice as much.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def output_path(out: str | None, checkpoint: str, work_dir: str | None) -> Path | None:
    """Choose the path of the main file.

    Args:
        out: Path that the user gave, or None.
        checkpoint: Path or URL of the checkpoint.
        work_dir: Folder for the file of a checkpoint that is not a local file.

    Returns:
        ``out``; else the checkpoint's path with the suffix .onnx, or, if it is a URL, its name in ``work_dir``. None
        if that is not known yet.

    Raises:
        UserError: If ``out`` does not end in .onnx.
    """
    if out is not None:
        if Path(out).suffix != '.onnx':
            raise UserError(f'--out is {out}, but must end in .onnx.')
        return Path(out)
    if '://' not in checkpoint:
        return Path(checkpoint).with_suffix('.onnx')
    return None if work_dir is None else Path(work_dir, Path(checkpoint).with_suffix('.onnx').name)


def load(cfg: Config, checkpoint: str) -> Student:
    """Build the student of a config on the CPU and load its checkpoint.

    Args:
        cfg: A config with a ``zsq`` section, or a composed one.
        checkpoint: Path or URL of a quantized checkpoint.

    Raises:
        UserError: If the config has no ``zsq`` section, or the checkpoint does not fit it.
    """
    if '://' not in checkpoint and not Path(checkpoint).expanduser().is_file():
        raise UserError(f'checkpoint {checkpoint} does not exist.')
    register_all_modules()
    classes = class_names(cfg)
    composed = compose(cfg)
    detector = MODELS.build(composed.model).eval()
    meta = load_student(detector, checkpoint)
    return Student(detector, choose_classes(classes, meta, known_num_classes(detector.student), checkpoint), composed)


def image_size(student: Student) -> tuple[int, int]:
    """Find a size that holds every image that the test pipeline makes.

    Args:
        student: The student with its config.

    Returns:
        Height and width in pixels. If the pipeline keeps the aspect ratio, both are the longer side, because images
        may stand upright.

    Raises:
        UserError: If the pipeline does not fix a size.
    """
    divisor = getattr(student.detector.data_preprocessor, 'pad_size_divisor', 1)
    frame = frame_of(student.pipeline, divisor)
    if frame is None:
        raise UserError('the test pipeline of the config fixes no size of images: give it by --size H W.')
    return (frame.height, frame.width) if frame.fixed else (max(frame[:2]), max(frame[:2]))


def runtimes_for(target: str) -> list[str]:
    """List the installed runtimes that a file is compared in.

    Args:
        target: Target of the file.

    Returns:
        Names of runtimes. OpenVINO computes wrong values for files for TensorRT.

    Raises:
        UserError: If the runtime of the target is not installed.
    """
    suitable = ['onnxruntime'] if target == 'tensorrt' else ['openvino', 'onnxruntime']
    needed = 'openvino' if target == 'openvino' else 'onnxruntime'
    if importlib.util.find_spec(needed) is None:
        raise UserError(f'--verify needs {needed}, which is not installed: run `pip install "mmzsq[deploy]"`.')
    return [name for name in suitable if importlib.util.find_spec(name) is not None]


def synthetic_images(student: Student, count: int) -> tuple[list[str | np.ndarray], str]:
    """Take images of the run's calibration set, or draw random ones if there is none.

    Args:
        student: The student with its config.
        count: Number of images.

    Returns:
        Paths, or arrays (H, W, 3) of uint8, and a phrase that says where they come from.
    """
    root = Path(student.cfg.zsq.calibration_set.dir)
    try:
        CalibrationSet.load(root)
        paths = sorted((root / 'images').glob('*.png'))[:count]
    except UserError:
        paths = []
    if paths:
        return [str(path) for path in paths], f'images of the calibration set {root}'
    generator = np.random.default_rng(0)
    height, width = image_size(student)
    noise = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
    return list(noise), f'images of random noise, because there is no calibration set in {root}'


def _progress(prefix: str = '') -> PhaseProgress:
    titles = {phase: f'{prefix}{title}' for phase, title in PHASES.items()}
    return PhaseProgress(MMLogger.get_current_instance(), titles, 'steps')


def _verify(student: Student, exported: Any, runtimes: Sequence[str], args: argparse.Namespace, teacher: Any) -> None:
    """Compare the files with PyTorch in all runtimes, write ``deploy.json``, and exit with 1 if a check fails."""
    from mmzsq.deploy import verify
    from mmzsq.deploy.agreement import References
    from mmzsq.image_detector import pipelines_of

    images, source = synthetic_images(student, args.verify)
    _log(f'detections are compared on {len(images)} {source}')
    from_path, from_array = pipelines_of(student.cfg)
    samples: list[Any] = [
        from_path(dict(img_path=image, img_id=index))
        if isinstance(image, str)
        else from_array(dict(img=image, img_id=index))
        for index, image in enumerate(images)
    ]
    main = next(iter(exported.files.values()))
    first = _padded(student, samples[0], exported.size)
    results: dict[str, Any] = dict(
        checkpoint=args.checkpoint,
        mmzsq_version=__version__,
        versions={name: _version(name) for name in ('torch', 'onnx', *runtimes)},
        images=dict(count=len(images), source=source),
        export=exported.to_dict(),
        runtimes={},
    )
    failures: list[str] = []
    references = References(student.detector.student, samples)
    for runtime in runtimes:
        with _progress(f'{runtime}: ') as progress:
            report = verify(
                student.detector,
                exported,
                first,
                runtime,
                student.cfg.model.detector,
                references,
                threads=torch.get_num_threads(),
                classes=student.classes,
                pipeline=student.pipeline,
                on_progress=progress.update,
            )
        results['runtimes'][runtime] = report.to_dict()
        failures += [f'{runtime}: {failure}' for failure in report.failures]
        _log(_summary(runtime, report))
    if args.ap:
        results['ap'] = _accuracies(student, main, runtimes, args.ap)
    if teacher is not None:
        results['speed'] = _speed(student, teacher, exported, args)
    results['passed'] = not failures
    _log(f'numbers in {record(Path(main), results)}')
    folder = Path(args.checkpoint).parent
    if teacher is not None and (folder / RESULTS_FILE).is_file():
        _log(f'report with the speed: {write_report([folder])}')
    if failures:
        shown = '\n'.join(f'  {failure}' for failure in failures[:20])
        sys.stderr.write(f'error: verification of {main} failed:\n{shown}\n')
        sys.exit(1)
    _log('verified')


def _speed(student: Student, teacher: Any, exported: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Export the teacher beside the student, and measure both in the runtime of the target."""
    from mmzsq.deploy import export_float
    from mmzsq.deploy.latency import measure_speed

    path = Path(next(iter(exported.files.values())))
    with _progress('full precision: ') as progress:
        plain = export_float(
            teacher,
            path.with_name(f'{path.stem}.float.onnx'),
            exported.size,
            raw=args.raw,
            dynamic_batch=args.dynamic_batch,
            exporter=args.exporter,
            classes=student.classes,
            pipeline=student.pipeline,
            on_progress=progress.update,
        )
    with _progress() as progress:
        speed = measure_speed(
            student.detector, exported, plain, exported.target, torch.get_num_threads(), progress.update
        )
    _log(f'{speed}')
    return speed.to_dict()


def record(main: Path, results: Mapping[str, Any] | None) -> Path:
    """Merge the numbers of one model into ``deploy.json`` beside its files.

    The content is ``passed``, whether all models passed, and ``models``: the numbers of each by the name of its main
    file. Entries whose main file was deleted, or replaced by another, are dropped.

    Args:
        main: Path of the main file.
        results: Its numbers with ``passed``. If None, only outdated entries are dropped.

    Returns:
        Path of ``deploy.json``.

    Raises:
        UserError: If the file cannot be written.
    """
    path = main.with_name(DEPLOY_FILE)
    with _locked(main.parent):
        try:
            kept = json.loads(path.read_bytes())['models']
            models = {name: entry for name, entry in kept.items() if entry['sha256'] == _sha256(path.with_name(name))}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Missing, or not written by this version.
            models = {}
        if results is not None:
            models[main.name] = dict(sha256=_sha256(main), **results)
        passed = all(entry['passed'] for entry in models.values())
        write_atomically(path, to_json(dict(passed=passed, models=models), indent=2))
    return path


def _sha256(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.is_file() else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other exports from merging into the same folder, where the system can lock one."""
    if os.name != 'posix':
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _padded(student: Student, sample: Mapping[str, Any], size: tuple[int, int]) -> torch.Tensor:
    """Normalize an image and pad it to the size of the file."""
    batch = dict(inputs=[sample['inputs']], data_samples=[copy.deepcopy(sample['data_samples'])])
    images = student.detector.data_preprocessor(batch, False)['inputs'].cpu()
    height, width = images.shape[2:]
    if height > size[0] or width > size[1]:
        raise UserError(
            f'the test pipeline makes images of {height}x{width} pixels, but the file takes {size[0]}x{size[1]}: '
            'export with a larger --size.'
        )
    return torch.nn.functional.pad(images, (0, size[1] - width, 0, size[0] - height))


def _summary(runtime: str, report: Any) -> str:
    checks = report.layers
    equal = sum(check.integers_equal for check in checks)
    alone = max((check.difference for check in checks if check.difference is not None), default=math.nan)
    if report.detections:
        compared = (
            f'{report.agreement:.1%} of {report.detections} detections agree, {report.self_agreement:.1%} of PyTorch '
            'with itself in another memory format'
        )
    else:
        compared = 'no detections to compare'
    return (
        f'{runtime}: integers equal in {equal} of {len(checks)} layers, largest difference of a layer alone '
        f'{alone:.1e}, {compared}'
    )


def _accuracies(student: Student, main: str, runtimes: Sequence[str], count: int) -> dict[str, Any]:
    """Evaluate checkpoint and files on the first images of the test data."""
    from mmzsq.deploy import detector_of

    metrics = dict(checkpoint=accuracy(student.detector, student.cfg, count))
    for runtime in runtimes:
        deployed = detector_of(main, student.cfg.model.detector, runtime, torch.get_num_threads())
        metrics[runtime] = accuracy(deployed, student.cfg, count)
    for name, values in metrics.items():
        _log(f'{name}, {values["images"]} images: {json.dumps(values["metrics"])}')
    return metrics


@torch.no_grad()
def accuracy(detector: Any, cfg: Config, count: int) -> dict[str, Any]:
    """Evaluate a detector on the first images of the test data.

    Args:
        detector: In eval mode.
        cfg: Config with ``test_dataloader`` and ``test_evaluator``.
        count: Number of images; all if there are fewer.

    Returns:
        ``images``, their number, and ``metrics``.

    Raises:
        UserError: If the data cannot be read.
    """
    check_data(cfg, 'test')
    try:
        dataset = DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
        # A subset by MMEngine's ``indices`` must be smaller than the data set.
        count = min(count, len(dataset))
        settings = copy.deepcopy(cfg.test_evaluator)
        metrics = [METRICS.build(metric) for metric in (settings if isinstance(settings, list) else [settings])]
    except Exception as error:
        # A data set is code of the user.
        raise UserError(f'--ap needs the test data of the config: {error}') from error
    check_built_dataset(dataset, class_names(cfg), 'test_dataloader.dataset')
    evaluator = Evaluator(metrics)
    evaluator.dataset_meta = dataset.metainfo
    for metric in metrics:
        # Those of the whole annotation file otherwise.
        if hasattr(metric, 'img_ids'):
            metric.img_ids = [dataset.get_data_info(index)['img_id'] for index in range(count)]
    for index in range(count):
        item = dataset[index]
        batch = dict(inputs=[item['inputs']], data_samples=[item['data_samples']])
        evaluator.process(data_samples=detector.test_step(batch), data_batch=batch)
    return dict(images=count, metrics={k: float(v) for k, v in evaluator.evaluate(count).items()})


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


def _log(message: str) -> None:
    print_log(message, logger='current', level=logging.INFO)


if __name__ == '__main__':
    cli.run(main)
