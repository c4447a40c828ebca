# SPDX-License-Identifier: Apache-2.0
"""Last step of ``make demo``: export the student, verify the file, and measure its speed on this machine."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config

from mmzsq import cli
from mmzsq.config.compose import class_names, detector_section
from mmzsq.deploy import RUNTIMES, DeployReport, Session, export, export_float, verify
from mmzsq.deploy.agreement import References
from mmzsq.engine.prediction import load_predictor
from mmzsq.errors import UserError
from mmzsq.image_detector import pipelines_of

CONFIG = Path(__file__).resolve().parents[1] / 'configs/zsq/yolov5-p_shapes_w4a4.py'
SIZE = (256, 256)
IMAGES = 4
THREADS = 1
ROUNDS = 50


def main() -> None:
    """Export, verify and measure."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('work_dir', type=Path, help='folder of the training')
    work_dir: Path = options.parse_args().work_dir
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir = str(work_dir)
    student, teacher = (
        load_predictor(path, cfg).detector.detector.cpu()
        for path in ((work_dir / 'last_checkpoint').read_text().strip(), cfg.load_from)
    )
    letterbox = [dict(type='LetterResize', scale=SIZE[::-1])]
    exported = export(student, work_dir / 'student.onnx', size=SIZE, classes=class_names(cfg), pipeline=letterbox)
    plain = export_float(teacher, work_dir / 'teacher.onnx', size=SIZE, classes=class_names(cfg), pipeline=letterbox)
    print(f'\n{exported.files["detector"]}: {_size(exported)}; in full precision: {_size(plain)}')

    load, _ = pipelines_of(cfg)
    paths = sorted((work_dir / 'calibration_set/images').glob('*.png'))[:IMAGES]
    samples = [load(dict(img_path=str(path), img_id=index)) for index, path in enumerate(paths)]
    with torch.no_grad():
        images = student.data_preprocessor(dict(inputs=[sample['inputs'] for sample in samples]))['inputs']
    references = References(student, samples)
    verified = True
    for runtime in RUNTIMES:
        checks = verify(
            *(student, exported, images, runtime, detector_section(cfg), references, THREADS),
            classes=class_names(cfg),
            pipeline=letterbox,
        )
        verified = verified and checks.passed
        checks.save(work_dir / f'deploy_{runtime}.json')
        worst = max((check.difference or 0.0 for check in checks.layers), default=0.0)
        print(
            f'{runtime}: {"verified" if checks.passed else "NOT verified"}: {len(checks.layers)} layers, integers '
            f'{"equal" if all(check.integers_equal for check in checks.layers) else "differ"}, worst layer alone '
            f'{worst:.0e}, {checks.agreement or 0:.0%} of the detections agree'
        )
        for failure in checks.failures:
            print(f'  {failure}')
    print(f'Median latency of {ROUNDS} alternating runs, {SIZE[0]}x{SIZE[1]} pixels, {THREADS} thread, {_cpu()}:')
    for runtime in RUNTIMES:
        names = dict(float=plain.files['detector'], quantized=exported.files['detector'])
        ms = latencies({name: Session(path, runtime, THREADS) for name, path in names.items()}, images[:1].numpy())
        precision = 'INFERENCE_PRECISION_HINT f32' if runtime == 'openvino' else 'float32'
        print(
            f'  {runtime} ({precision}): float {ms["float"]:.2f} ms, W4A4 in 8-bit integers {ms["quantized"]:.2f} ms, '
            f'{ms["float"] / ms["quantized"]:.2f}x as fast'
        )
    print('ONNX Runtime runs the convolutions of this file in float: docs/deploy.md says what it needs for integers.')
    if not verified:
        raise UserError('the exported file differs from the student: see above.')


def latencies(sessions: Mapping[str, Session], image: np.ndarray) -> dict[str, float]:
    """Return the median milliseconds of each session; runs alternate, so that all see the same load."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for index in range(ROUNDS + 5):
        for name, session in sessions.items():
            start = time.perf_counter()
            session(image)
            # The first runs prepare memory.
            if index >= 5:
                found[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def _size(report: DeployReport) -> str:
    return f'{sum(report.bytes.values()) / 1e6:.2f} MB'


def _cpu() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.machine())


if __name__ == '__main__':
    cli.run(main)
