# SPDX-License-Identifier: Apache-2.0
"""Detections that are selected from decoded predictions are those of MMDetection's own heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from harness import zoo_config
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from onnx import TensorProto, helper
from torch import nn

from mmzsq.deploy import Session, detector_of, export_float
from mmzsq.deploy.heads import parts_of
from mmzsq.deploy.predictor import read_metadata, run_images, runtime_for, select
from mmzsq.errors import UserError

DENSE = {
    'RetinaNet': ('retinanet/retinanet_r50_fpn_1x_coco.py', 64, 4),
    'FCOS': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 64, 4),
    'ATSS': ('atss/atss_r50_fpn_1x_coco.py', 64, 4),
    'GFL': ('gfl/gfl_r50_fpn_1x_coco.py', 64, 4),
    'YOLOX': ('yolox/yolox_tiny_8xb8-300e_coco.py', 128, 1),
    'YOLOv3': ('yolo/yolov3_d53_8xb8-ms-608-273e_coco.py', 64, 1),
    'RTMDet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 128, 1),
}
"""Config, side of the images, divisor of the channels."""
SCALE = {'YOLOv3': 1000}
"""Features of a random Darknet are as many times larger than 1."""
WITH_FACTORS = ('FCOS', 'ATSS', 'YOLOv3')


def _detector(name: str) -> tuple[Any, int]:
    register_all_modules()
    path, size, shrink = DENSE[name]
    detector: Any = MODELS.build(zoo_config(path, size, shrink).model)
    for layer in detector.bbox_head.modules():
        # Scores then spread around the threshold.
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=2 / (layer.weight[0].numel() ** 0.5) / SCALE.get(name, 1))
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    # Limits that decide about many predictions.
    detector.bbox_head.test_cfg.update(score_thr=0.3, conf_thr=0.3, nms_pre=40, max_per_img=1000)
    return detector.eval(), size


@pytest.mark.parametrize('name', DENSE)
def test_selected_detections_are_those_of_the_head(name: str) -> None:
    detector, size = _detector(name)
    head = detector.bbox_head
    images = torch.randn(2, 3, size, size)
    metas = [
        dict(img_shape=(size, size), ori_shape=(2 * size, 2 * size), scale_factor=(0.5, 0.5)),
        dict(img_shape=(size - 20, size), ori_shape=(size - 20, size), scale_factor=(1.0, 1.0)),
    ]
    [part] = parts_of(detector, (size, size), raw=False)
    assert part.output_names == ['boxes', 'scores', 'factors'][: 3 if name in WITH_FACTORS else 2]
    with torch.no_grad():
        expected = head.predict(detector.extract_feat(images), [DetDataSample(metainfo=m) for m in metas], rescale=True)
        boxes, scores, factors = (*part.module(images), None)[:3]
    for index, meta in enumerate(metas):
        factor = None if factors is None else factors[index]
        found = select(head, boxes[index], scores[index], factor, part.locations, meta, rescale=True)
        assert len(found) == len(expected[index]) > 3
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(found[key], expected[index][key], rtol=1e-4, atol=1e-3)


def _file(path: Path, **metadata: str) -> Path:
    """An identity on images of 4x6 pixels, with metadata."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 6]) for name in ('images', 'map')]
    graph = helper.make_graph([helper.make_node('Identity', ['images'], ['map'])], 'g', value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_smaller_images_are_padded_as_the_preprocessor_pads(tmp_path: Path) -> None:
    file = _file(tmp_path / 'm.onnx', size='[4, 6]', pad_value='7.0')
    images = torch.randn(2, 3, 3, 5)
    [output] = run_images(Session(file, 'onnxruntime'), images)
    expected = np.pad(images.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=7.0)
    np.testing.assert_array_equal(output.numpy(), expected)
    with pytest.raises(UserError, match='export with --size 5 5 or more'):
        run_images(Session(file, 'onnxruntime'), torch.zeros(1, 3, 5, 5))


@pytest.mark.parametrize(
    ('target', 'expected'), [('openvino', 'openvino'), ('onnxruntime', 'onnxruntime'), ('tensorrt', 'onnxruntime')]
)
def test_a_file_runs_where_it_was_exported_for(target: str, expected: str, tmp_path: Path) -> None:
    file = _file(tmp_path / 'm.onnx', mmzsq_version='1', part='detector', target=target)
    assert runtime_for(file) == expected
    assert runtime_for(file, 'onnxruntime') == 'onnxruntime'


def test_files_that_cannot_be_evaluated_are_named(tmp_path: Path) -> None:
    tensorrt = _file(tmp_path / 't.onnx', mmzsq_version='1', part='detector', target='tensorrt')
    with pytest.raises(UserError, match='which OpenVINO computes wrongly'):
        runtime_for(tensorrt, 'openvino')
    with pytest.raises(UserError, match='is the part box_head of a two-stage detector'):
        read_metadata(_file(tmp_path / 'b.onnx', mmzsq_version='1', part='box_head'))
    (tmp_path / 'text.onnx').write_text('not a model')
    with pytest.raises(UserError, match=r'text\.onnx is damaged or not an ONNX file'):
        read_metadata(tmp_path / 'text.onnx')


def test_a_plain_config_builds_the_detector_of_a_file(tiny_cfg: Any, tmp_path: Path) -> None:
    """MMDetection's heads read attributes of their ``test_cfg``."""
    detector: Any = MODELS.build(tiny_cfg('retinanet_r18')).eval()
    export_float(detector, tmp_path / 'float.onnx', size=(64, 64))
    deployed = detector_of(tmp_path / 'float.onnx', tiny_cfg('retinanet_r18').to_dict())
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
    batch = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=[sample])
    expected, found = (owner.test_step(copy.deepcopy(batch))[0].pred_instances for owner in (detector, deployed))
    assert len(found) == len(expected)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
