# SPDX-License-Identifier: Apache-2.0
"""Whole detectors: files, metadata, verification and predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from onnx import numpy_helper
from torch import nn

from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.deploy import DeployReport, OnnxDetector, Session, detector_of, export, verify
from mmzsq.deploy.heads import parts_of
from mmzsq.deploy.verify import agreement
from mmzsq.errors import UserError
from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare, quantized_layers

RUNTIMES = ('onnxruntime', 'openvino')


def _random_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.normal_(1.0, 0.5)
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)


def _quantize(detector: Any, run: Callable[[], Any], bits: int, **config: Any) -> Any:
    cfg = QuantizationConfig.from_dict(dict(w_bits=bits, a_bits=bits, first_bits='same', last_bits='same', **config))
    prepare(detector.eval(), cfg)
    with torch.no_grad():
        if cfg.equalize:
            equalize(detector, run)
        with calibrating(detector):
            run()
    return detector


def _scenes() -> torch.Tensor:
    """Two drawn scenes (2, 3, 128, 128), normalized."""
    scenes = [torch.from_numpy(np.ascontiguousarray(draw_scene(0, index, 128).image)) for index in range(2)]
    return torch.stack(scenes).permute(0, 3, 1, 2)[:, [2, 1, 0]].float() / 255


def _demo(repo: Path, bits: int, **config: Any) -> tuple[Any, Any, torch.Tensor]:
    from mmdet.utils import register_all_modules
    from safetensors.torch import load_file

    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py')
    detector = MODELS.build(cfg.model)
    detector.load_state_dict(load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors'))
    images = _scenes()
    return _quantize(detector, lambda: detector(images), bits, **config), cfg, images


@pytest.fixture(scope='module')
def demo(repo: Path) -> tuple[Any, Any, torch.Tensor]:
    """The shipped detector with 4 bits and input factors, its config, and a batch."""
    return _demo(repo, 4, equalize=True)


@pytest.fixture(scope='module')
def demo_8_bits(repo: Path) -> tuple[Any, Any, torch.Tensor]:
    """The shipped detector with 8 bits."""
    return _demo(repo, 8)


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


@pytest.mark.parametrize('spoiled', ['weight_integers', 'weight_step', 'input_step', 'bias'])
def test_verification_names_the_layer_that_was_tampered_with(demo: Any, tmp_path: Path, spoiled: str) -> None:
    detector, _, images = demo
    report = export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    model = onnx.load(tmp_path / 'demo.onnx')
    layer = 'backbone.stage2.0.conv'
    names = {
        'weight_integers': f'{layer}.weight_integers',
        'weight_step': f'{layer}.weight_step',
        'input_step': f'{layer}.input/0/step',
        'bias': f'{layer}.bias',
    }
    tensor = next(t for t in model.graph.initializer if t.name == names[spoiled])
    values = np.array(numpy_helper.to_array(tensor))
    first = (0,) * values.ndim
    values[first] = values[first] + 1 if values.dtype.kind in 'iu' else values[first] * 1.001
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / 'demo.onnx')
    checks = verify(detector, report, images, 'onnxruntime', threads=1)
    assert not checks.passed
    assert checks.failures[0].startswith(f'{layer} (call 0): ')


@pytest.mark.parametrize('raw', [True, False])
@pytest.mark.parametrize('runtime', RUNTIMES)
def test_predictions_equal_those_of_the_checkpoint(demo: Any, tmp_path: Path, runtime: str, raw: bool) -> None:
    detector, cfg, _ = demo
    export(detector, tmp_path / 'demo.onnx', size=(256, 256), raw=raw, classes=['a', 'b'])
    deployed = OnnxDetector(tmp_path / 'demo.onnx', cfg, runtime, threads=1)
    samples = [deployed._prepare(draw_scene(1, index).image) for index in range(3)]
    assert agreement(detector, deployed.detector, samples) > 0.9
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


def _tiny(cfg: Any, size: int, run: Callable[[Any, torch.Tensor], Any]) -> Any:
    detector: Any = MODELS.build(cfg).eval()
    _random_batch_norms(detector)
    images = torch.randn(1, 3, size, size)
    return _quantize(detector, lambda: run(detector, images), 8)


def _run_both_stages(detector: Any, images: torch.Tensor) -> None:
    features = detector.extract_feat(images)
    detector.rpn_head(features)
    for part in parts_of_heads(detector):
        part(features)


def parts_of_heads(detector: Any) -> list[Callable[[Any], Any]]:
    rois = torch.tensor([[0.0, 0.0, 0.0, 50.0, 50.0], [0.0, 10.0, 5.0, 64.0, 30.0]])
    roi_head = detector.roi_head
    stages = [()] if not hasattr(roi_head, 'num_stages') else [(stage,) for stage in range(roi_head.num_stages)]
    calls: list[Callable[[Any], Any]] = [lambda x, s=s: roi_head._bbox_forward(*s, x, rois) for s in stages]
    if roi_head.with_mask:
        calls.append(lambda x: roi_head._mask_forward(x, rois))
    return calls


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'cascade-rcnn_r18', 'mask-rcnn_swin'])
def test_two_stage_detectors_are_verified_in_parts(name: str, tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    cfg = tiny_cfg(name)
    detector = _tiny(cfg, 64, _run_both_stages)
    report = export(detector, tmp_path / 'model.onnx', size=(64, 64))
    assert (
        set(report.files)
        == {
            'mask-rcnn_r18': {'features', 'box_head', 'mask_head'},
            'mask-rcnn_swin': {'features', 'box_head', 'mask_head'},
            'cascade-rcnn_r18': {'features', 'box_head0', 'box_head1', 'box_head2'},
        }[name]
    )
    for runtime in RUNTIMES:
        checks = verify(detector, report, runtime=runtime, threads=1)
        assert checks.passed, checks.failures


def test_a_two_stage_detector_predicts_boxes_and_masks(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    from mmdet.structures import DetDataSample

    cfg = tiny_cfg('mask-rcnn_r18')
    detector = _tiny(cfg, 64, _run_both_stages)
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
    detector = _tiny(tiny_cfg('retinanet_r18'), 64, lambda model, x: model.bbox_head(model.extract_feat(x)))
    report: DeployReport = export(detector, tmp_path / 'model.onnx', size=(64, 64))
    assert max(layer.call for layer in report.layers) == 4
    for runtime in RUNTIMES:
        checks = verify(detector, report, runtime=runtime, threads=1)
        assert checks.passed, checks.failures


def test_decoded_boxes_are_those_of_mmdetection(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> None:
    """Every location, against the head's own ``predict_by_feat`` without threshold and NMS."""
    from mmengine.config import ConfigDict

    detector = _tiny(tiny_cfg('retinanet_r18'), 64, lambda model, x: model.bbox_head(model.extract_feat(x)))
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
