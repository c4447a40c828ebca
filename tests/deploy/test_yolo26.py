# SPDX-License-Identifier: Apache-2.0
"""A quantized YOLO26 runs without NMS, in the package and from its file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData
from quantized_detectors import quantize_detector, random_batch_norms

from mmzsq.deploy import OnnxDetector, Session, StandaloneDetector, export, verify

SIZE = (64, 96)
CLASSES = ['a', 'b', 'c']
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='mmzsq.LetterResize', scale=(96, 64)),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param')),
]


@pytest.fixture(scope='module')
def parts(repo: Path) -> tuple[Any, Any]:
    """A config and a small detector with 8 bits, whose boxes overlap a lot."""
    register_all_modules()
    torch.manual_seed(0)
    cfg = Config.fromfile(repo / 'configs/yolo26/yolo26-n_coco.py').model
    for part in ('backbone', 'neck', 'bbox_head'):
        cfg[part].update(widen_factor=0.125, max_channels=512)
    cfg.bbox_head.num_classes = 3
    cfg.test_cfg.update(score_thr=0.3, max_per_img=50)
    detector: Any = MODELS.build(cfg).eval()
    random_batch_norms(detector)
    for box_convs, cls_convs in zip(detector.bbox_head.box_convs, detector.bbox_head.cls_convs, strict=True):
        torch.nn.init.constant_(box_convs[2].bias, 3.0)
        torch.nn.init.normal_(cls_convs[2].weight, std=0.2)
        torch.nn.init.constant_(cls_convs[2].bias, 0.0)
    images = torch.rand(2, 3, *SIZE)
    run = lambda: detector(images, mode='tensor')  # noqa: E731
    return cfg, quantize_detector(detector, run, 8)


@pytest.fixture(scope='module')
def exported(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A file with the output ``detections``, and the report of its export."""
    path = tmp_path_factory.mktemp('yolo26') / 'm.onnx'
    _, detector = parts
    report = export(detector, path, target='onnxruntime', size=SIZE, pipeline=PIPELINE, classes=CLASSES, nms=True)
    return path, report


@pytest.mark.nightly
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_the_file_is_verified(parts: Any, tmp_path: Path, runtime: str) -> None:
    _, detector = parts
    options: Any = dict(pipeline=PIPELINE, classes=CLASSES)
    report = export(detector, tmp_path / 'm.onnx', target=runtime, size=SIZE, nms=True, **options)
    assert verify(detector, report, runtime=runtime, **options).failures == []


def test_detections_are_those_of_the_detector(parts: Any, exported: Any) -> None:
    cfg, _ = parts
    path, _ = exported
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    config = dict(model=cfg, test_dataloader=dict(dataset=dict(pipeline=PIPELINE)))
    expected = OnnxDetector(path, config, 'onnxruntime', threads=1)([image])[0].pred_instances
    found = StandaloneDetector(path, 'onnxruntime', threads=1)([image])[0].pred_instances
    assert len(found) == len(expected) == 50
    for key in ('scores', 'labels', 'bboxes'):
        torch.testing.assert_close(found[key].float(), expected[key].float(), rtol=1e-4, atol=0.02)
    # NMS would drop most of them.
    overlapping = _overlaps(expected)
    assert (overlapping > 0.7).sum() > 10


def test_the_file_selects_the_best_scores(exported: Any) -> None:
    path, _ = exported
    session = Session(path, 'onnxruntime', threads=1)
    assert json.loads(session.metadata['nms'])['iou_threshold'] is None
    assert json.loads(session.metadata['selection'])['iou_threshold'] is None
    boxes, scores, detections = session(np.random.default_rng(1).random((1, 3, *SIZE), dtype=np.float32))
    best = np.sort(scores[0].ravel())[::-1][:50]
    np.testing.assert_allclose(detections[:, 4], best[best > 0.3])
    locations = [int(np.flatnonzero((scores[0] == score).any(1))[0]) for score in detections[:, 4]]
    np.testing.assert_allclose(detections[:, :4], boxes[0, locations])


def _overlaps(found: InstanceData) -> torch.Tensor:
    """IoU of each box with the best earlier one of its class."""
    from torchvision.ops import box_iou

    overlaps = box_iou(found.bboxes, found.bboxes) * (found.labels[:, None] == found.labels)
    return torch.triu(overlaps, diagonal=1).amax(0)
