# SPDX-License-Identifier: Apache-2.0
"""Whole detectors: files, metadata, verification and predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from mmdet.registry import MODELS
from quantized_detectors import random_detector, run_both_stages
from torch import nn

from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.deploy import DeployReport, OnnxDetector, Session, detector_of, export, verify
from mmzsq.deploy.agreement import agreement, detect
from mmzsq.deploy.heads import parts_of
from mmzsq.errors import UserError
from mmzsq.quantization import QuantizationConfig, prepare, quantized_layers

RUNTIMES = ('onnxruntime', 'openvino')


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_heads_of_4_bits_equal_pytorch(demo: Any, tmp_path: Path, runtime: str) -> None:
    detector, _, images = demo
    report = export(detector, tmp_path / 'demo.onnx', size=(128, 128), raw=True)
    given = Session(tmp_path / 'demo.onnx', runtime, threads=1)(images[:1].numpy())
    with torch.no_grad():
        expected = detector(images[:1])[0]
    for value, output in zip(expected, given, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), value, rtol=1e-4, atol=1e-4)
    assert {layer.batch_norm for layer in report.layers} == {'folded', None}


@pytest.mark.parametrize('fixture', ['demo', 'demo_8_bits'])
def test_every_convolution_runs_in_8_bits_in_openvino(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    detector, _, _ = request.getfixturevalue(fixture)
    export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    executed = Session(tmp_path / 'demo.onnx', 'openvino', threads=1).executed()
    precisions = [precision for _, kind, precision in executed if 'Conv' in kind]
    assert precisions == ['u8'] * len(list(quantized_layers(detector)))


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_verification_passes_for_what_was_exported(demo_8_bits: Any, tmp_path: Path, runtime: str) -> None:
    detector, _, images = demo_8_bits
    report = export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    checks = verify(detector, report, images, runtime, threads=1)
    assert checks.passed, checks.failures
    assert len(checks.layers) == len(list(quantized_layers(detector)))
    assert all(check.integers_equal and check.difference < 1e-5 for check in checks.layers)
    assert not checks.float_layers
    checks.save(tmp_path / 'deploy.json')
    assert json.loads((tmp_path / 'deploy.json').read_bytes())['passed'] is True


@pytest.mark.parametrize('raw', [True, False])
@pytest.mark.parametrize('runtime', RUNTIMES)
def test_predictions_equal_those_of_the_checkpoint(demo: Any, tmp_path: Path, runtime: str, raw: bool) -> None:
    detector, cfg, _ = demo
    export(detector, tmp_path / 'demo.onnx', size=(256, 256), raw=raw, classes=['a', 'b'])
    deployed = OnnxDetector(tmp_path / 'demo.onnx', cfg, runtime, threads=1)
    samples = [deployed._prepare(draw_scene(1, index).image) for index in range(3)]
    assert agreement(detect(detector, samples), detect(deployed.detector, samples)) > 0.9
    found = deployed([draw_scene(1, 0).image])[0].pred_instances
    assert len(found[found.scores > 0.3]) > 0
    assert deployed.detector.dataset_meta == dict(classes=('a', 'b'))


def test_metadata_say_what_a_user_of_the_file_needs(demo: Any, tmp_path: Path) -> None:
    detector, cfg, _ = demo
    pipeline = cfg.test_dataloader.dataset.pipeline
    export(detector, tmp_path / 'demo.onnx', size=(128, 192), classes=['disc', 'ring'], pipeline=pipeline)
    metadata = Session(tmp_path / 'demo.onnx', 'onnxruntime').metadata
    assert metadata['target'] == 'openvino'
    values = {key: json.loads(metadata[key]) for key in ('size', 'classes', 'mean', 'std', 'bgr_to_rgb', 'bits')}
    assert values['size'] == [128, 192] and values['classes'] == ['disc', 'ring']
    assert values['std'] == [255.0] * 3 and values['bgr_to_rgb'] is True
    assert values['bits']['backbone.stem.conv'] == [4, 4]


def test_a_dynamic_batch(demo: Any, tmp_path: Path) -> None:
    detector, _, images = demo
    export(detector, tmp_path / 'demo.onnx', size=(128, 128), dynamic_batch=True)
    with torch.no_grad():
        expected = parts_of(detector, (128, 128), raw=False)[0].module(images)
    for runtime in RUNTIMES:
        given = Session(tmp_path / 'demo.onnx', runtime, threads=1)(images.numpy())
        for value, output in zip(expected, given, strict=True):
            assert output.shape == tuple(value.shape)
            torch.testing.assert_close(torch.from_numpy(output), value, rtol=1e-3, atol=1e-3)


def test_export_writes_all_or_nothing(demo: Any, tmp_path: Path, tiny_cfg: Callable[[str], Any]) -> None:
    detector, cfg, _ = demo
    file = tmp_path / 'out' / 'demo.onnx'
    for message, model, options in (
        ('does not end in .onnx', detector, dict(path=tmp_path / 'out' / 'demo.pt')),
        ("target is 'coreml'", detector, dict(target='coreml')),
        ('positive multiples of 32', detector, dict(size=(100, 128))),
        ('no quantized layers', MODELS.build(cfg.model), dict()),
    ):
        with pytest.raises(UserError, match=message):
            export(model, **dict(dict(path=file, size=(128, 128)), **options))
    assert not file.parent.exists()


def test_a_predictor_refuses_files_of_others(demo: Any, tmp_path: Path, tiny_cfg: Callable[[str], Any]) -> None:
    detector, cfg, _ = demo
    with pytest.raises(UserError, match='does not exist'):
        detector_of(tmp_path / 'none.onnx', cfg.model)
    export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    with pytest.raises(UserError, match='holds a YOLOv5, but the config describes a RetinaNet'):
        detector_of(tmp_path / 'demo.onnx', tiny_cfg('retinanet_r18'))
    model = onnx.load(tmp_path / 'demo.onnx')
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'foreign.onnx')
    with pytest.raises(UserError, match='was not written by'):
        detector_of(tmp_path / 'foreign.onnx', cfg.model)


@pytest.mark.parametrize(
    ('name', 'target'),
    [
        ('mask-rcnn_r18', 'openvino'),
        ('mask-rcnn_r18', 'onnxruntime'),
        ('cascade-rcnn_r18', 'openvino'),
        ('mask-rcnn_swin', 'openvino'),
        ('mask-rcnn_swin', 'tensorrt'),
    ],
)
def test_two_stage_detectors_are_verified_in_parts(
    name: str, target: str, tiny_cfg: Callable[[str], Any], tmp_path: Path
) -> None:
    cfg = tiny_cfg(name)
    # For ONNX Runtime, layers share the quantizers of their inputs and outputs.
    settings: dict[str, Any] = dict(onnxruntime=dict(outputs=8), tensorrt=dict(target='tensorrt'))
    detector = random_detector(cfg, 64, run_both_stages, **settings.get(target, {}))
    state = {key: value.clone() for key, value in detector.state_dict().items()}
    report = export(detector, tmp_path / 'model.onnx', target, size=(64, 64))
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())
    assert (
        set(report.files)
        == {
            'mask-rcnn_r18': {'features', 'box_head', 'mask_head'},
            'mask-rcnn_swin': {'features', 'box_head', 'mask_head'},
            'cascade-rcnn_r18': {'features', 'box_head0', 'box_head1', 'box_head2'},
        }[name]
    )
    # OpenVINO computes wrong values for files for TensorRT.
    for runtime in ('onnxruntime',) if target == 'tensorrt' else RUNTIMES:
        checks = verify(detector, report, runtime=runtime, threads=1)
        assert checks.passed, checks.failures


def test_a_two_stage_detector_predicts_boxes_and_masks(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    from mmdet.structures import DetDataSample

    cfg = tiny_cfg('mask-rcnn_r18')
    detector = random_detector(cfg, 64, run_both_stages)
    export(detector, tmp_path / 'model.onnx', size=(64, 64))
    sample = DetDataSample(metainfo=dict(img_shape=(50, 64), ori_shape=(100, 128), scale_factor=(0.5, 0.5), img_id=0))
    image = torch.randint(0, 255, (3, 50, 64), dtype=torch.uint8)
    for runtime in RUNTIMES:
        deployed = detector_of(tmp_path / 'model.onnx', tiny_cfg('mask-rcnn_r18'), runtime, threads=1)
        batch = dict(inputs=[image], data_samples=[sample.clone()])
        with torch.no_grad():
            found = deployed.test_step(batch)[0].pred_instances
            expected = detector.test_step(dict(inputs=[image], data_samples=[sample.clone()]))[0].pred_instances
        assert found.masks.shape[1:] == (100, 128)
        assert abs(len(found) - len(expected)) <= 0.1 * len(expected) + 1
        assert float(found.scores.max()) == pytest.approx(float(expected.scores.max()), rel=0.05)


def test_a_head_on_several_levels_is_verified(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    detector = random_detector(tiny_cfg('retinanet_r18'), 64, lambda model, x: model.bbox_head(model.extract_feat(x)))
    report: DeployReport = export(detector, tmp_path / 'model.onnx', size=(64, 64))
    assert max(layer.call for layer in report.layers) == 4
    for runtime in RUNTIMES:
        checks = verify(detector, report, runtime=runtime, threads=1)
        assert checks.passed, checks.failures


def test_decoded_boxes_are_those_of_mmdetection(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    """Every location, against the head's own ``predict_by_feat`` without threshold and NMS."""
    from mmengine.config import ConfigDict

    detector = random_detector(tiny_cfg('retinanet_r18'), 64, lambda model, x: model.bbox_head(model.extract_feat(x)))
    images = torch.randn(1, 3, 64, 64)
    part = parts_of(detector, (64, 64), raw=False)[0]
    with torch.no_grad():
        boxes, scores = part.module(images)
        maps = detector.bbox_head(detector.extract_feat(images))
        everything = detector.bbox_head.predict_by_feat(
            *maps,
            batch_img_metas=[dict(img_shape=(10**6, 10**6))],
            cfg=ConfigDict(score_thr=-1.0, nms_pre=10**6, min_bbox_size=-1),
            with_nms=False,
        )[0]
    assert sum(part.locations) == boxes.shape[1]
    best = scores[0].flatten().sort(descending=True).values
    torch.testing.assert_close(everything.scores.sort(descending=True).values, best)
    inside = boxes[0].clamp(min=0)
    for index in (0, 7, -1):
        row = everything.bboxes[index]
        assert float((inside - row).abs().amax(1).min()) < 1e-3


@pytest.mark.parametrize('name', ['htc_r18'])
def test_what_cannot_be_exported_is_named(name: str, tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    detector: Any = MODELS.build(tiny_cfg(name))
    with pytest.raises(UserError, match='roi_head \\(HybridTaskCascadeRoIHead\\) cannot be exported'):
        parts_of(detector, (64, 64), raw=False)


@pytest.mark.parametrize('raw', [False, True])
def test_a_head_that_returns_a_dict_is_refused(raw: bool, tiny_cfg: Callable[[str], Any]) -> None:
    detector: Any = MODELS.build(tiny_cfg('retinanet_r18'))
    forward = detector.bbox_head.forward
    detector.bbox_head.forward = lambda x: dict(zip(('classes', 'boxes'), forward(x), strict=True))
    with pytest.raises(UserError, match='its head returns a value of type dict'):
        parts_of(detector, (64, 64), raw)


def test_an_extractor_of_regions_with_layers_is_refused(tiny_cfg: Callable[[str], Any]) -> None:
    """GRoIE's extractor has convolutions, which would be in none of the files."""
    detector: Any = MODELS.build(tiny_cfg('faster-rcnn_r18'))
    extractor = detector.roi_head.bbox_roi_extractor
    extractor.post = nn.Sequential(nn.Conv2d(4, 4, 1))
    prepare(extractor, QuantizationConfig(w_bits=8, a_bits=8, first_bits='same', last_bits='same'))
    with pytest.raises(UserError, match=r'roi_head.bbox_roi_extractor \(SingleRoIExtractor\) cannot be exported'):
        parts_of(detector, (64, 64), raw=False)
