# SPDX-License-Identifier: Apache-2.0
"""Detectors and files that the deployment benchmarks compare.

A float detector and its quantized students are exported by :mod:`mmzsq.deploy`. Post-training quantization by other
tools starts from the float file: NNCF, in a Python environment of its own, and ``onnxruntime.quantization``.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import numpy as np
import onnx
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

import mmzsq
from mmzsq.atomic_files import make_directory, to_json, write_atomically
from mmzsq.checkpoint import load_from_local
from mmzsq.config import compose
from mmzsq.deploy.export import build_part
from mmzsq.deploy.heads import Part, parts_of
from mmzsq.errors import UserError
from mmzsq.quantization import calibrating, equalize, set_quantization
from mmzsq.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = 'benchmarks/results/deploy'
WORK_DIR = Path('work_dirs/deploy')
"""Default folder for exported files."""
NNCF_PYTHON = Path('work_dirs/nncf/bin/python')
"""Default Python that imports NNCF: ``python -m venv work_dirs/nncf`` and ``work_dirs/nncf/bin/pip install nncf``."""
NOISE_SIZE = (256, 256)
"""Height and width, in pixels, of the image of noise that random weights are initialized with."""
CPU_FEATURES = ('avx2', 'avx512f', 'avx_vnni', 'avx512_vnni', 'avx512_bf16', 'amx_int8', 'amx_bf16')
"""Instructions that decide how fast a CPU multiplies in 8 bits and in bf16."""


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config from ``configs/zsq``.

    Args:
        path: Relative to the root of the repository.
        options: Values that override the config, by dotted key.
    """
    cfg = Config.fromfile(ROOT / path)
    cfg.merge_from_dict(dict(options or {}))
    cfg.setdefault('work_dir', str(WORK_DIR))
    init_default_scope('mmdet')
    # Building a detector logs each of its weights.
    MMLogger.get_current_instance().setLevel('WARNING')
    return cfg


def build_float(cfg: Config, checkpoint: Path | None = None) -> Any:
    """Build the float detector of a config.

    Args:
        cfg: From :func:`load_config`.
        checkpoint: Its weights. Without one, weights are random, and BatchNorm takes its statistics from an image of
            noise, so that activations keep their scale through the network.
    """
    model = copy.deepcopy(cfg.model)
    _forget_pretrained(model)
    detector: Any = MMDET_MODELS.build(model)
    if checkpoint is not None:
        detector.load_state_dict(load_from_local(str(checkpoint))['state_dict'])
        return detector.eval()
    torch.manual_seed(0)
    detector.init_weights()
    parts = parts_of(detector.eval(), NOISE_SIZE, raw=True)
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.momentum = 1.0
    _run_on_noise(parts)
    return detector.eval()


def build_student(
    cfg: Config, checkpoint: Path | None = None, float_detector: nn.Module | None = None, calibrate: bool = True
) -> Any:
    """Build the quantized detector of a config.

    Args:
        cfg: From :func:`load_config`.
        checkpoint: A checkpoint that ``python -m mmzsq.train`` wrote.
        float_detector: Without a checkpoint, the student takes these weights, and its steps fit an image of noise.
            This is enough to measure time.
        calibrate: Whether steps fit noise; otherwise they are left to the caller.
    """
    cfg = copy.deepcopy(cfg)
    _forget_pretrained(cfg.model)
    holder: Any = MODELS.build(compose(cfg).model)
    if checkpoint is not None:
        holder.load_state_dict(load_from_local(str(checkpoint))['state_dict'])
        return holder.student.eval()
    if float_detector is None:
        raise UserError('a student needs a checkpoint or the weights of a float detector')
    holder.student.load_state_dict(float_detector.state_dict(), strict=False)
    student = holder.student.eval()
    if not calibrate:
        return student
    set_quantization(student, False)
    parts = parts_of(student, NOISE_SIZE, raw=True)
    set_quantization(student, True)
    with torch.no_grad():
        if holder.quantization_config.equalize:
            equalize(student, lambda: _run_on_noise(parts))
        with calibrating(student):
            _run_on_noise(parts)
    return student


@torch.no_grad()
def _run_on_noise(parts: Sequence[Part]) -> None:
    torch.manual_seed(0)
    for part in parts:
        part.module(torch.rand(part.example.shape))


def write_float_files(detector: Any, like: Path, folder: Path, size: tuple[int, int]) -> dict[str, Path]:
    """Write a float detector as ONNX, in the same parts as a quantized export that ends at raw maps.

    Args:
        detector: The float detector.
        like: Main file of a quantized export of the same detector, which gives the metadata.
        folder: Gets one file for each part.
        size: Height and width of the images, in pixels.

    Returns:
        Path of each file by the name of its part.
    """
    make_directory(folder)
    metadata = {entry.key: entry.value for entry in onnx.load(like, load_external_data=False).metadata_props}
    files = {}
    for part in parts_of(detector, size, raw=True):
        built = build_part(detector, part, 'openvino', metadata=metadata)
        files[part.name] = folder / f'{part.name}.onnx'
        write_atomically(files[part.name], built.model.SerializeToString())
    return files


def quantize_with_nncf(model: Path, inputs: Path, out: Path, python: Path = NNCF_PYTHON) -> None:
    """Quantize a float file with NNCF: preset MIXED, fast bias correction, all inputs.

    Args:
        model: The float file.
        inputs: ``.npy`` of network inputs (N, 3, H, W), float32 and normalized.
        out: The ``.xml`` to write; its weights go beside it into ``.bin``.
        python: Interpreter of an environment with ``nncf``.

    Raises:
        UserError: If there is no such interpreter, or NNCF fails.
    """
    if not python.exists():
        raise UserError(
            f'{python} does not exist: run `python -m venv work_dirs/nncf` and `work_dirs/nncf/bin/pip install nncf '
            'openvino`, or name another interpreter with --nncf-python.'
        )
    make_directory(out.parent)
    script = Path(__file__).with_name('nncf_quantize.py')
    # The environment of this package is not that of NNCF.
    environment = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'PYTHONHOME')}
    command = [python.absolute(), script, model, inputs, out]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'NNCF failed on {model}: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')


def quantize_with_onnxruntime(model: Path, inputs: np.ndarray, out: Path) -> None:
    """Quantize a float file with ``onnxruntime.quantization.quantize_static``.

    Q/DQ format, uint8 activations, int8 weights per channel, MinMax: its defaults except for the channels.

    Args:
        model: The float file.
        inputs: Network inputs (N, ...), float32.
        out: The ``.onnx`` to write, with the metadata of ``model``.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(model).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: np.ascontiguousarray(batch[None])}

    make_directory(out.parent)
    prepared, unfinished = out.with_suffix('.float.onnx'), out.with_suffix('.part.onnx')
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(unfinished),
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    written = onnx.load(unfinished)
    del written.metadata_props[:]
    written.metadata_props.extend(onnx.load(model).metadata_props)
    write_atomically(out, written.SerializeToString())
    for path in (prepared, unfinished):
        path.unlink()


def noise_images(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Draw images of uniform noise, (N, 3, H, W) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, *size), dtype=np.uint8)


@torch.no_grad()
def evaluate(detector: Any, cfg: Config, limit: int | None = None) -> dict[str, float]:
    """Evaluate on the test data of a config, as ``python -m mmzsq.test`` does.

    Args:
        detector: Has ``test_step``.
        cfg: With ``test_dataloader`` and ``test_evaluator``.
        limit: Evaluate the first images alone, for a quick try.

    Returns:
        Metrics by name; ``images``: number of images.
    """
    loader = copy.deepcopy(cfg.test_dataloader)
    loader.update(num_workers=0, persistent_workers=False)
    if limit is not None:
        loader.dataset.indices = limit
    data = Runner.build_dataloader(loader, seed=0)
    evaluator = Evaluator(copy.deepcopy(cfg.test_evaluator))
    evaluator.dataset_meta = data.dataset.metainfo
    for batch in data:
        evaluator.process(data_samples=detector.test_step(batch), data_batch=batch)
    return dict(evaluator.evaluate(len(data.dataset)), images=len(data.dataset))


def describe_cpu() -> dict[str, Any]:
    """Return name, number of cores, and those of :data:`CPU_FEATURES` that the CPU has."""
    fields: dict[str, str] = {}
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        lines = (line.partition(':') for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(fields.get('flags', '').split())
    return dict(
        name=fields.get('model name') or platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        features=[feature for feature in CPU_FEATURES if feature in flags],
    )


def describe_versions(nncf_python: Path | None = None) -> dict[str, str]:
    """Return the versions of the software that results depend on.

    Args:
        nncf_python: Interpreter to ask for the version of NNCF, if that took part.
    """
    versions = dict(
        mmzsq=mmzsq.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        mmdet=mmdet.__version__,
        mmengine=mmengine.__version__,
    )
    for package in ('onnx', 'onnxruntime', 'openvino'):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if nncf_python is not None and nncf_python.exists():
        code = 'import importlib.metadata; print(importlib.metadata.version("nncf"))'
        asked = subprocess.run([nncf_python.absolute(), '-c', code], capture_output=True, text=True)
        if asked.returncode == 0:
            versions['nncf'] = asked.stdout.strip()
    return versions


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Return the command of the running script, relative to the repository."""
    script = Path(sys.argv[0])
    name = f'benchmarks/{script.name}'
    return ' '.join(['python', name, *(sys.argv[1:] if arguments is None else arguments)])


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write one result as JSON."""
    make_directory(path.parent)
    write_atomically(path, to_json(content, indent=2))


def _forget_pretrained(model: Any) -> None:
    """Remove ``init_cfg`` that names a download; a teacher or random weights replace it."""
    for part in model.values():
        if isinstance(part, Mapping):
            _forget_pretrained(part)
    init = model.get('init_cfg')
    if isinstance(init, Mapping) and init.get('type') == 'Pretrained':
        model.init_cfg = None
