# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.predict``: pictures and COCO results of checkpoints and exported files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou

from mmzsq import cli, predict
from mmzsq.config import compose
from mmzsq.datasets.shapes_drawing import CLASS_NAMES, draw_scene
from mmzsq.registry import MODELS
from mmzsq.visualization import draw_detections
from mmzsq.visualization.gallery import GAP, TITLE_HEIGHT

WEIGHTS = 'mmzsq://yolov5-p_shapes.safetensors'
Call = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with two drawn scenes of 256 pixels, one file of other content, and one that is no image."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'images'
    folder.mkdir()
    for index, name in enumerate(('a.png', 'b.PNG')):
        cv2.imwrite(str(folder / name), draw_scene(1, index).image)
    (folder / 'notes.txt').write_text('')
    (folder / 'c.jpg').write_text('damaged')
    return folder


@pytest.fixture
def call(images: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the tool on the images and return its results."""

    def call(model: str, *args: str, config: str | None = 'shapes/yolov5-p_shapes.py') -> list[dict[str, Any]]:
        options = () if config is None else ('--config', str(repo / 'configs' / config))
        monkeypatch.setattr(sys, 'argv', ['predict', model, 'images', '--out', 'out', *options, *args])
        cli.run(predict.main)
        return json.loads(Path('out/predictions.json').read_text())

    return call


def test_detections_are_the_objects_of_the_scenes(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    rows = call(WEIGHTS, '--score-thr', '0.7')
    for index, name in enumerate(('a.png', 'b.PNG')):
        own = [row for row in rows if row['file_name'] == name]
        assert {row['image_id'] for row in own} == {index}
        scene = draw_scene(1, index)
        boxes = torch.tensor([row['bbox'] for row in own])
        boxes[:, 2:] += boxes[:, :2]
        overlap, best = box_iou(boxes, torch.as_tensor(scene.bboxes).float()).max(1)
        assert len(own) >= 2 and float(overlap.min()) > 0.5
        assert [row['category_id'] for row in own] == torch.as_tensor(scene.labels)[best].tolist()
        assert [row['score'] for row in own] == sorted((row['score'] for row in own), reverse=True)
        picture = cv2.imread(f'out/{name}')
        assert max(picture.shape) == 640
    captured = capsys.readouterr()
    assert 'c.jpg cannot be read as an image: skipped' in captured.err
    assert f'2 images, 1 skipped; detections with a score of at least 0.7: {len(rows)} by' in captured.out
    assert sorted(path.name for path in Path('out').iterdir()) == ['a.png', 'b.PNG', 'predictions.json']


def test_a_student_is_drawn_beside_its_teacher(call: Call, repo: Path) -> None:
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')
    cfg.work_dir = 'work'
    model: Any = MODELS.build(compose(cfg).model)
    model.init_weights()
    inputs = [torch.from_numpy(draw_scene(2, index).image.transpose(2, 0, 1).copy()) for index in range(2)]
    samples = [DetDataSample(metainfo=dict(img_shape=(256, 256), ori_shape=(256, 256))) for _ in range(2)]
    model.initialize_quantizers([dict(inputs=inputs, data_samples=samples)])
    torch.save(dict(state_dict=model.state_dict()), 'student.pth')
    quantized = call('student.pth', '--compare-with', config='zsq/yolov5-p_shapes_w4a4.py')
    compared = json.loads(Path('out/compared_predictions.json').read_text())
    assert compared == call(WEIGHTS)
    assert quantized != compared and len(quantized) > 0
    call('student.pth', '--compare-with', config='zsq/yolov5-p_shapes_w4a4.py')
    assert cv2.imread('out/a.png').shape == (640 + TITLE_HEIGHT, 2 * 640 + GAP, 3)
    with pytest.raises(SystemExit):
        call('student.pth')


def test_an_exported_file_needs_no_config(call: Call, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('onnx', exc_type=ImportError)
    pytest.importorskip('openvino', exc_type=ImportError)
    from mmzsq.deploy import export_float
    from mmzsq.engine.prediction import load_predictor

    cfg = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py')
    detector = load_predictor(WEIGHTS, cfg).detector.detector
    pipeline = [dict(type='mmzsq.LetterResize', scale=(256, 256))]
    expected = call(WEIGHTS)
    own, others = list(CLASS_NAMES), [f'figure {index}' for index in range(8)]
    for classes, config in ((others, None), (own, 'shapes/yolov5-p_shapes.py')):
        export_float(detector, 'shapes.onnx', size=(256, 256), classes=classes, pipeline=pipeline)
        rows = call('shapes.onnx', '--runtime', 'openvino', '--threads', '1', config=config)
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected, strict=True):
            assert row['category_id'] == other['category_id']
            assert row['category_name'] == classes[row['category_id']]
            np.testing.assert_allclose(row['bbox'], other['bbox'], atol=0.1)
    export_float(detector, 'shapes.onnx', size=(256, 256), classes=others, pipeline=pipeline)
    with pytest.raises(SystemExit):
        call('shapes.onnx', '--runtime', 'openvino')
    assert "class 0 is 'disc' in the config and 'figure 0' in shapes.onnx" in capsys.readouterr().err


def test_masks_are_written_as_run_lengths_and_drawn() -> None:
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:15, 10:30] = True
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 5.0, 30.0, 15.0], [0.0, 0.0, 60.0, 40.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 7]),
        masks=masks,
    )
    first, second = predict.coco_results(found, 3, 'x.png', ['cat', 'dog'])
    assert first['bbox'] == [10.0, 5.0, 20.0, 10.0]
    np.testing.assert_array_equal(coco_mask.decode(first['segmentation']), masks[0].numpy())
    assert (first['category_name'], second['category_name']) == ('dog', 'class 7')
    gray = np.full((40, 60, 3), 100, np.uint8)
    drawn = draw_detections(gray, found, ['dog', 'class 7'])
    del found.masks
    plain = draw_detections(gray, found, ['dog', 'class 7'])
    changed = (drawn != plain).any(2)
    scale = 640 / 60
    assert changed[round(11 * scale), round(20 * scale)]
    assert not changed[round(20 * scale) :].any()


def test_names_stay_inside_the_picture() -> None:
    corners = torch.tensor([[0.0, 0.0, 5.0, 5.0], [635.0, 475.0, 640.0, 480.0], [635.0, 0.0, 640.0, 5.0]])
    found = InstanceData(bboxes=corners, scores=torch.tensor([0.9, 0.8, 0.7]), labels=torch.tensor([0, 1, 2]))
    names = ['a long name of a class'] * 3
    drawn = draw_detections(np.full((480, 640, 3), 100, np.uint8), found, names)
    widths = [
        int((drawn[rows, columns] != 100).any(2).any(0).sum())
        for rows, columns in (
            (slice(0, 25), slice(0, 320)),
            (slice(440, 480), slice(320, 640)),
            (slice(0, 25), slice(320, 640)),
        )
    ]
    assert max(widths) - min(widths) <= 6 and min(widths) > 150


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['w.pth', 'nothing', '--out', 'out'], 'nothing does not exist'),
        (['w.pth', 'empty', '--out', 'out'], 'empty has no images'),
        (['w.pth', 'images/notes.txt', '--out', 'out'], 'is not an image'),
        (['w.pth', 'images', '--out', 'file'], '--out file is a file: name a folder'),
        (['w.pth', 'images', '--out', 'images'], 'holds the image a.png, which its picture would replace'),
        (['w.pth', 'images', 'images/a.png', '--out', 'out'], 'would become one picture'),
        (['w.pth', 'images', '--out', 'out'], 'needs the config of its detector: add --config CONFIG'),
        (['w.pth', 'images', '--out', 'out', '--config', 'no.py'], 'config no.py does not exist'),
        (['w.pth', 'images', '--out', 'out', '--cfg-options', 'a=1'], 'add --config CONFIG'),
        (['w.pth', 'images', '--out', 'out', '--score-thr', '3'], '--score-thr is 3.0, but must be in [0, 1]'),
        (['w.pth', 'images', '--out', 'out', '--runtime', 'openvino'], 'are for an exported .onnx file'),
        (['w.pth', 'images', '--out', 'out', '--config', 'shapes.py'], 'checkpoint w.pth does not exist'),
        (['w.pth', 'images', '--out', 'out', '--config', 'bare.py'], 'bare.py has no test_dataloader.dataset'),
        ([WEIGHTS, 'images/c.jpg', '--out', 'out', '--config', 'shapes.py'], 'none of the 1 images can be read'),
        (['images/a.png', 'images', '--out', 'out', '--runtime', 'tensorflow'], "invalid choice: 'tensorflow'"),
    ],
)
def test_a_mistake_is_one_message(
    args: list[str],
    message: str,
    images: Path,
    repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path('empty').mkdir()
    Path('file').write_text('')
    Path('bare.py').write_text("model = dict(type='YOLOX')")
    Path('shapes.py').write_text(f"_base_ = '{repo / 'configs/shapes/yolov5-p_shapes.py'}'")
    monkeypatch.setattr(sys, 'argv', ['predict', *args])
    with pytest.raises(SystemExit) as ended:
        cli.run(predict.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().glob('out/*'))
