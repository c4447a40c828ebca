# SPDX-License-Identifier: Apache-2.0
"""Every architecture and every bit width of configs/zsq exports within a minute and 4 GB, and is verified.

Weights are random and steps come from random inputs. Each export runs in a process of its own, which measures its time
and its peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

pytestmark = pytest.mark.zoo

for package in ('onnx', 'onnxruntime'):
    pytest.importorskip(package, exc_type=ImportError)

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'zsq'
MAX_SECONDS, MAX_GIGABYTES = 60, 4
ARCHITECTURES = {
    'faster-rcnn_r50': ('w4a8', 128),
    'mask-rcnn_r50': ('w8a8', 128),
    'mask-rcnn_r50_voc': ('w8a8', 128),
    'mask-rcnn_swin-s': ('w6a6', 128),
    'mask-rcnn_swin-t': ('w4a8', 128),
    'retinanet_r50': ('w4a8', 128),
    'rtmdet-s': ('w8a8', 128),
    'yolo11-l': ('w6a6', 128),
    'yolo11-m': ('w8a8', 128),
    'yolo11-n': ('w4a8', 128),
    'yolo11-s': ('w6a6', 128),
    'yolo26-l': ('w6a6', 128),
    'yolo26-m': ('w8a8', 128),
    'yolo26-n': ('w4a8', 128),
    'yolo26-s': ('w6a6', 128),
    'yolo26-x': ('w8a8', 128),
    'yolov3_d53': ('w4a8', 128),
    'yolov5-l': ('w4a4', 128),
    'yolov5-m': ('w5a5', 128),
    'yolov5-n': ('w8a8', 128),
    'yolov5-p_shapes': ('w4a4', 128),
    'yolov5-s': ('w6a6', 128),
    'yolov8-l': ('w6a6', 128),
    'yolov8-m': ('w8a8', 128),
    'yolov8-n': ('w4a8', 128),
    'yolov8-s': ('w6a6', 128),
    'yolov8-x': ('w8a8', 128),
    'yolox-s': ('w4a8', 128),
}
"""Bits that each architecture is exported with, and side of the images in pixels."""


def test_every_leaf_has_its_architecture_and_its_bits_here() -> None:
    leaves = [path.stem.rpartition('_') for path in CONFIGS.glob('*.py')]
    assert {architecture for architecture, _, _ in leaves} == set(ARCHITECTURES)
    assert {bits for _, _, bits in leaves} == {bits for bits, _ in ARCHITECTURES.values()}


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_a_leaf_exports_within_its_limits(architecture: str, tmp_path: Path) -> None:
    bits, size = ARCHITECTURES[architecture]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, __file__, str(CONFIGS / f'{architecture}_{bits}.py'), str(tmp_path), str(size), 'verify']
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert ended.returncode == 0, ended.stderr[-3000:]
    measured = json.loads(ended.stdout.splitlines()[-1])
    assert measured['failures'] == []
    assert measured['seconds'] <= MAX_SECONDS and measured['gigabytes'] <= MAX_GIGABYTES, measured


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('detr/detr_r50_8xb2-150e_coco.py', r'encoder \(DetrTransformerEncoder\)'),
        ('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', r'encoder \(DeformableDetrTransformerEncoder\)'),
        (
            'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
            r'backbone.layer2.0.conv2 \(QuantDeformConv2dPack\) cannot be exported',
        ),
        (
            'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
            r'backbone.layer2.0.conv2 \(QuantModulatedDeformConv2dPack\) cannot be exported',
        ),
    ],
)
def test_transformers_and_deformable_convolutions_are_refused_by_name(
    config: str, message: str, tmp_path: Path
) -> None:
    from harness import CONFIGS as MMDET_CONFIGS

    from mmzsq.deploy import export
    from mmzsq.errors import UserError

    register_all_modules()
    cfg = Config.fromfile(MMDET_CONFIGS / config)
    if 'num_queries' in cfg.model:
        # A small image has fewer locations than these detectors have queries.
        cfg.model.num_queries = 30
    detector = _student(cfg.model, dict(w_bits=8, a_bits=8)).student
    with pytest.raises(UserError, match=message) as caught:
        export(detector, tmp_path / 'model.onnx', size=(128, 128))
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


def _student(model: Any, quantizer: dict[str, Any]) -> Any:
    """Quantize a detector with random weights and BatchNorms, with steps from random inputs."""
    from mmzsq.qat import ZeroShotDetector
    from mmzsq.qat.dry_run import dry_run
    from mmzsq.quantization import calibrating, quantizers

    torch.manual_seed(0)
    detector = ZeroShotDetector(model, quantizer)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            with torch.no_grad():
                module.weight.normal_(1.0, 0.3)
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
    zeros = torch.zeros

    def noise(*shape: Any, **options: Any) -> torch.Tensor:
        return torch.randn(*shape) if shape[1:2] == (3,) else zeros(*shape, **options)

    with torch.no_grad(), calibrating(detector.student), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'zeros', noise)
        dry_run(detector.student.eval(), 128)
    assert all(quantizer.ready for _, quantizer in quantizers(detector.student))
    return detector


def main(config: str, folder: str, side: str, *options: str) -> None:
    """Export one leaf, print time, peak memory and failures as JSON; ``verify`` also verifies in ONNX Runtime."""
    from mmzsq.config import compose
    from mmzsq.deploy import export, verify

    register_all_modules()
    cfg = compose(Config.fromfile(config))
    detector = _student(cfg.model.detector, cfg.model.quantizer.to_dict())
    height, width = (int(side), int(side))
    start = time.perf_counter()
    report = export(detector, Path(folder) / 'model.onnx', size=(height, width), classes=['a'])
    seconds = time.perf_counter() - start
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    failures = verify(detector, report, runtime='onnxruntime', threads=1, classes=['a']).failures if options else []
    measured = dict(
        config=Path(config).stem,
        size=[height, width],
        seconds=round(seconds, 1),
        gigabytes=round(gigabytes, 2),
        megabytes={name: round(count / 1e6, 2) for name, count in report.bytes.items()},
        failures=failures,
    )
    sys.stdout.write(json.dumps(measured) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
