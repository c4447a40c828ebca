# SPDX-License-Identifier: Apache-2.0
"""A calibration set in the layouts of other tools."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmengine.structures import InstanceData

from mmzsq.datasets.set_formats import FORMATS, Preprocessing, write_format
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet

HEIGHT, WIDTH = 40, 60
PREPROCESSING = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def calibration_set(tmp_path: Path) -> CalibrationSet:
    boxes = torch.tensor([[4.0, 6.0, 24.0, 26.0], [30.0, 0.0, 60.0, 20.0]])
    labels = [InstanceData(bboxes=boxes, labels=torch.tensor([0, 2])) for _ in range(3)]
    settings = dict(fingerprint={}, num_images=3, shard_size=3, classes=('cat', 'dog', 'person'))
    made = CalibrationSet.open(tmp_path / 'set', **settings)
    made.write_shard(0, images(), labels)
    made.merge()
    return made


def write(calibration_set: CalibrationSet, name: str, tmp_path: Path) -> Path:
    out = tmp_path / name
    write_format(calibration_set, name, out, Preprocessing.from_config(PREPROCESSING))
    return out


@pytest.mark.parametrize('name', FORMATS)
def test_each_format_says_layout_and_normalization(calibration_set: CalibrationSet, name: str, tmp_path: Path) -> None:
    out = write(calibration_set, name, tmp_path)
    assert 'RGB, (pixel - mean) / std with mean [123.675' in (out / 'README.md').read_text()
    assert json.loads((out / 'preprocessing.json').read_text())['std'] == PREPROCESSING['std']
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize('to_rgb', [True, False])
def test_inputs_equal_those_of_mmdetections_preprocessor(
    calibration_set: CalibrationSet, to_rgb: bool, tmp_path: Path
) -> None:
    settings = dict(PREPROCESSING, bgr_to_rgb=to_rgb)
    write_format(calibration_set, 'openvino', tmp_path / 'out', Preprocessing.from_config(settings))
    bgr = torch.from_numpy(images()[..., ::-1].transpose(0, 3, 1, 2).copy())
    expected = DetDataPreprocessor(**settings)(dict(inputs=list(bgr), data_samples=None))['inputs']
    found = np.load(tmp_path / 'out/inputs.npy')
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_yolo_labels_are_centers_and_sizes_as_shares(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    out = write(calibration_set, 'yolo', tmp_path)
    rows = [[float(v) for v in line.split()] for line in (out / 'labels/000001.txt').read_text().splitlines()]
    np.testing.assert_allclose(rows, [[0, 14 / 60, 16 / 40, 20 / 60, 0.5], [2, 0.75, 0.25, 0.5, 0.5]], atol=1e-6)
    assert '2: "person"' in (out / 'data.yaml').read_text()
    assert len(list((out / 'images').iterdir())) == 3


def test_arrays_hold_the_images_in_order(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    for name, file in (('npy', 'images.npy'), ('hailo', 'calib_set.npy')):
        np.testing.assert_array_equal(np.load(write(calibration_set, name, tmp_path) / file), images())


def test_files_listed_for_rknn_exist(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    out = write(calibration_set, 'rknn', tmp_path)
    listed = (out / 'dataset.txt').read_text().split()
    assert len(listed) == 3
    for index, name in enumerate(listed):
        np.testing.assert_array_equal(cv2.imread(str(out / name))[..., ::-1], images()[index])


def test_the_loader_for_polygraphy_yields_one_input_at_a_time(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    out = write(calibration_set, 'tensorrt', tmp_path)
    feeds = list(runpy.run_path(str(out / 'data_loader.py'))['load_data']())
    assert [feed['images'].shape for feed in feeds] == [(1, 3, HEIGHT, WIDTH)] * 3
    np.testing.assert_array_equal(np.concatenate([feed['images'] for feed in feeds]), np.load(out / 'inputs.npy'))


def test_coco_annotations_are_those_of_the_set(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    out = write(calibration_set, 'coco', tmp_path)
    file = 'annotations/instances.json'
    assert (out / file).read_bytes() == (calibration_set.root / file).read_bytes()


def test_mistakes_leave_nothing_behind(calibration_set: CalibrationSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format 'tflite': choose one of coco, yolo, npy"):
        write(calibration_set, 'tflite', tmp_path)
    (tmp_path / 'npy').mkdir()
    (tmp_path / 'npy/mine.txt').write_text('')
    with pytest.raises(UserError, match='already holds files'):
        write(calibration_set, 'npy', tmp_path)
    (calibration_set.root / 'images/000002.png').write_bytes(b'')
    with pytest.raises(UserError, match='000002.png is missing or damaged'):
        write(calibration_set, 'hailo', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['npy', 'set']
