# SPDX-License-Identifier: Apache-2.0
"""NMS in the file against torchvision's on the same boxes and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from quantized_detectors import random_detector, run_both_stages
from torchvision.ops import nms

from mmzsq.deploy import OnnxDetector, Session, export
from mmzsq.deploy.nms import NmsSettings, append_nms, nms_of, suppress
from mmzsq.errors import UserError

RUNTIMES = ('onnxruntime', 'openvino')


def _predictions(seed: int, locations: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 60, (1, locations, 2))
    boxes = np.concatenate((corners, corners + generator.uniform(5, 40, (1, locations, 2))), axis=2)
    return boxes.astype(np.float32), generator.uniform(0, 1, (1, locations, classes)).astype(np.float32)


def _graph(settings: NmsSettings, boxes: np.ndarray, scores: np.ndarray) -> bytes:
    """Boxes and scores as they are, with NMS behind them."""
    names, shapes = ('boxes', 'scores'), (boxes.shape, scores.shape)
    given = [helper.make_tensor_value_info(f'{n}_in', TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    found = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    nodes = [helper.make_node('Identity', [f'{name}_in'], [name]) for name in names]
    model = helper.make_model(
        helper.make_graph(nodes, 'predictions', given, found), opset_imports=[helper.make_opsetid('', 17)]
    )
    model.ir_version = 8
    append_nms(model, settings)
    return model.SerializeToString()


def _class_by_class(boxes: np.ndarray, scores: np.ndarray, settings: NmsSettings) -> np.ndarray:
    """Torchvision's NMS of one class at a time, in plain loops."""
    rows = []
    for label in range(scores.shape[2]):
        values = torch.from_numpy(scores[0, :, label])
        mask = values > settings.score_threshold
        if settings.one_class:
            mask &= torch.from_numpy(scores[0].argmax(1) == label)
        index = mask.nonzero().flatten()
        for kept in index[nms(torch.from_numpy(boxes[0])[index], values[index], settings.iou_threshold)].tolist():
            rows.append([*boxes[0, kept], scores[0, kept, label], label])
    rows.sort(key=lambda row: -row[4])
    return np.asarray(rows[: settings.max_detections], dtype=np.float32).reshape(-1, 6)


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('one_class', [False, True])
def test_detections_are_those_of_torchvision(runtime: str, one_class: bool) -> None:
    for seed, threshold, limit in ((0, 0.3, 100), (1, 0.05, 7), (2, 0.9, 100)):
        settings = NmsSettings(0.5, threshold, limit, one_class)
        boxes, scores = _predictions(seed)
        expected = _class_by_class(boxes, scores, settings)
        given = Session(_graph(settings, boxes, scores), runtime, threads=1)(boxes, scores)[2]
        assert len(expected) > 0
        np.testing.assert_allclose(given, expected, rtol=1e-6)
        np.testing.assert_allclose(
            suppress(torch.from_numpy(boxes[0]), torch.from_numpy(scores[0]), settings), expected, rtol=1e-6
        )


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_without_nms_the_best_scores_are_selected(runtime: str) -> None:
    boxes, scores = _predictions(0)
    for threshold, limit in ((0.3, 20), (0.95, 100), (2.0, 5)):
        settings = NmsSettings(None, threshold, limit, False)
        rows = [
            [*boxes[0, place], scores[0, place, label], label]
            for place, label in np.ndindex(scores.shape[1:])
            if scores[0, place, label] > threshold
        ]
        expected = np.asarray(sorted(rows, key=lambda row: -row[4])[:limit], np.float32).reshape(-1, 6)
        model = _graph(settings, boxes, scores)
        assert 'NonMaxSuppression' not in {node.op_type for node in onnx.load_from_string(model).graph.node}
        np.testing.assert_allclose(Session(model, runtime, threads=1)(boxes, scores)[2], expected, rtol=1e-6)
        found = suppress(torch.from_numpy(boxes[0]), torch.from_numpy(scores[0]), settings)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_an_empty_image_has_no_detections(runtime: str) -> None:
    boxes, scores = _predictions(0)
    settings = NmsSettings(0.5, 2.0, 100, False)
    given = Session(_graph(settings, boxes, scores), runtime, threads=1)(boxes, scores)[2]
    assert given.shape == (0, 6)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_a_detector_with_nms(demo: Any, tmp_path: Path, runtime: str) -> None:
    detector, cfg, images = demo
    export(detector, tmp_path / 'demo.onnx', size=(128, 128), nms=True)
    session = Session(tmp_path / 'demo.onnx', runtime, threads=1)
    assert session.outputs == ['boxes', 'scores', 'detections']
    written = json.loads(session.metadata['nms'])
    assert written['iou_threshold'] == 0.6 and written['score_threshold'] == 0.001
    assert written['output'] == 'detections' and written['layout'].startswith('(D, 6)')
    boxes, scores, detections = session(images[:1].numpy())
    settings = nms_of(detector.bbox_head)
    np.testing.assert_allclose(detections, _class_by_class(boxes, scores, settings), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        [own] = detector.bbox_head.predict(
            detector.extract_feat(images[:1]), [SimpleNamespace(metainfo=dict(img_shape=(128, 128)))], rescale=False
        )
    likely = detections[detections[:, 4] > 0.3]
    expected = own[own.scores > 0.3]
    assert len(likely) == len(expected) > 0
    np.testing.assert_allclose(likely[:, 4], expected.scores.numpy(), rtol=1e-3)
    # The predictor reads boxes and scores, and leaves NMS to the detector.
    export(detector, tmp_path / 'demo.onnx', size=(256, 256), nms=True)
    assert len(OnnxDetector(tmp_path / 'demo.onnx', cfg, runtime, threads=1)([np.zeros((128, 128, 3), np.uint8)])) == 1


def test_what_nms_cannot_follow_is_refused_before_a_file_is_written(
    demo: Any, tiny_cfg: Callable[[str], Any], tmp_path: Path
) -> None:
    detector, _, _ = demo
    file = tmp_path / 'model.onnx'
    two_stage = random_detector(tiny_cfg('mask-rcnn_r18'), 64, run_both_stages)
    for message, model, options in (
        ('has two stages', two_stage, dict(size=(64, 64))),
        ('export without --raw', detector, dict(size=(128, 128), raw=True)),
        ('export without --dynamic-batch', detector, dict(size=(128, 128), dynamic_batch=True)),
    ):
        with pytest.raises(UserError, match=message):
            export(model, file, nms=True, **options)
    assert not list(tmp_path.iterdir())


def test_other_kinds_of_nms_are_refused() -> None:
    cfg = dict(nms=dict(type='soft_nms', iou_threshold=0.5), score_thr=0.05, max_per_img=100)
    with pytest.raises(UserError, match='--nms writes class-wise NMS'):
        nms_of(SimpleNamespace(test_cfg=cfg))
    with pytest.raises(UserError, match='positive test_cfg.max_per_img'):
        nms_of(SimpleNamespace(test_cfg=dict(cfg, nms=dict(type='nms', iou_threshold=0.5), max_per_img=-1)))


def test_the_graph_is_standard_onnx() -> None:
    boxes, scores = _predictions(0)
    model = onnx.load_from_string(_graph(NmsSettings(0.5, 0.1, 10, True), boxes, scores))
    assert {opset.domain for opset in model.opset_import} == {''}
    onnx.checker.check_model(model, full_check=True)
