# SPDX-License-Identifier: Apache-2.0
"""Files run without a config, in the package and in the example that needs onnxruntime and numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from harness import zoo_config
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from safetensors.torch import load_file

from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.deploy import OnnxDetector, StandaloneDetector, export_float
from mmzsq.errors import UserError

META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param')
RESIZE: dict[str, list[dict[str, Any]]] = {
    'letterbox': [dict(type='mmzsq.LetterResize', scale=(192, 128))],
    'keep_ratio': [dict(type='Resize', scale=(192, 128), keep_ratio=True)],
    'keep_ratio_and_pad': [
        dict(type='Resize', scale=(192, 128), keep_ratio=True),
        dict(type='Pad', size=(192, 128), pad_val=dict(img=(114.0, 114.0, 114.0))),
    ],
    'stretch': [dict(type='Resize', scale=(192, 128), keep_ratio=False)],
}
CLASSES = ['disc', 'ring', 'square', 'frame', 'triangle', 'bar', 'cross', 'star']


def _pipeline(resize: str) -> list[dict[str, Any]]:
    return [
        dict(type='LoadImageFromFile'),
        *RESIZE[resize],
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs', meta_keys=META if resize == 'letterbox' else META[:-1]),
    ]


def _export(cfg: Any, detector: Any, resize: str, path: Path, **options: Any) -> Any:
    """Export for images of 128x192 pixels; return a config with the pipeline."""
    pipeline = _pipeline(resize)
    export_float(detector, path, size=(128, 192), pipeline=pipeline, classes=CLASSES, **options)
    return dict(model=cfg.model, test_dataloader=dict(dataset=dict(pipeline=pipeline)))


@pytest.fixture
def shapes(repo: Path) -> tuple[Config, Any]:
    """The shipped detector."""
    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py')
    detector = MODELS.build(cfg.model)
    detector.load_state_dict(load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors'))
    return cfg, detector


def _scene() -> np.ndarray:
    """A drawn scene of 200x256 pixels, BGR."""
    return np.ascontiguousarray(draw_scene(1, 0).image[:200])


def _assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) > 3
    for key in ('scores', 'labels', 'bboxes'):
        torch.testing.assert_close(found[key].float(), expected[key].float(), rtol=1e-4, atol=0.02)


@pytest.mark.parametrize('resize', RESIZE)
def test_metadata_replace_the_config(resize: str, shapes: Any, tmp_path: Path) -> None:
    parts = _export(*shapes, resize, tmp_path / 'm.onnx')
    image = _scene()
    expected = OnnxDetector(tmp_path / 'm.onnx', parts, threads=1)([image])[0].pred_instances
    alone = StandaloneDetector(tmp_path / 'm.onnx', threads=1)
    _assert_same(alone([image])[0].pred_instances, expected)
    assert alone.classes == CLASSES


@pytest.mark.parametrize('name', ['retinanet/retinanet_r50_fpn_1x_coco.py', 'atss/atss_r50_fpn_1x_coco.py'])
def test_heads_that_clip_and_multiply_select_the_same_without_config(name: str, tmp_path: Path) -> None:
    register_all_modules()
    cfg = zoo_config(name, 64, 4)
    cfg.model.bbox_head.num_classes = 8
    cfg.model.test_cfg.update(nms_pre=50, max_per_img=40)
    detector: Any = MODELS.build(cfg.model)
    for layer in detector.bbox_head.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=1 / (layer.weight[0].numel() ** 0.5))
    parts = _export(cfg, detector, 'stretch', tmp_path / 'm.onnx')
    image = _scene()
    expected = OnnxDetector(tmp_path / 'm.onnx', parts, threads=1)([image])[0].pred_instances
    _assert_same(StandaloneDetector(tmp_path / 'm.onnx', threads=1)([image])[0].pred_instances, expected)


def test_a_file_that_needs_its_config_says_why(shapes: Any, tmp_path: Path) -> None:
    cfg, detector = shapes
    _export(cfg, detector, 'letterbox', tmp_path / 'raw.onnx', raw=True)
    with pytest.raises(UserError, match=r'raw\.onnx cannot run without its config: it holds the raw maps .* --config'):
        StandaloneDetector(tmp_path / 'raw.onnx')
    export_float(detector, tmp_path / 'bare.onnx', size=(128, 128))
    with pytest.raises(UserError, match='does not say how images are resized'):
        StandaloneDetector(tmp_path / 'bare.onnx')


@pytest.mark.parametrize('resize', RESIZE)
def test_the_example_runs_without_torch_and_mmdet(resize: str, shapes: Any, tmp_path: Path, repo: Path) -> None:
    parts = _export(*shapes, resize, tmp_path / 'm.onnx')
    cv2.imwrite(str(tmp_path / 'scene.png'), _scene())
    for package in ('torch', 'mmdet', 'mmcv', 'mmengine', 'mmzsq'):
        (tmp_path / 'blocked' / package).mkdir(parents=True)
        (tmp_path / 'blocked' / package / '__init__.py').write_text("raise ImportError('blocked')")
    script = repo / 'demo/onnx_inference.py'
    assert len(script.read_text().splitlines()) <= 40
    result = subprocess.run(
        [sys.executable, str(script), 'm.onnx', 'scene.png'],
        cwd=tmp_path,
        env=dict(PYTHONPATH=str(tmp_path / 'blocked'), PATH=''),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    expected = OnnxDetector(tmp_path / 'm.onnx', parts, 'onnxruntime', threads=1)([_scene()])[0].pred_instances
    expected = expected[expected.scores > 0.3]
    assert [row[0] for row in rows] == [CLASSES[label] for label in expected.labels] != []
    np.testing.assert_allclose([float(row[1]) for row in rows], expected.scores, atol=2e-3)
    np.testing.assert_allclose([[float(v) for v in row[2:]] for row in rows], expected.bboxes, atol=0.1)
