# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.generate CONFIG --format NAME``, and tools that calibrate on what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mmzsq import cli
from mmzsq import generate as generate_tool
from mmzsq.datasets.set_formats import Preprocessing, write_format
from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.synthesis import CalibrationSet


@pytest.fixture
def generate(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the tool with a tiny config; the set is in out/calibration_set."""
    make_config('out').dump('config.py')

    def generate(*args: str) -> None:
        monkeypatch.setattr(sys, 'argv', ['generate', 'config.py', '--work-dir', 'out', *args])
        cli.run(generate_tool.main)

    return generate


def test_the_set_is_written_for_another_tool_once_it_is_complete(generate: Any) -> None:
    generate('--format', 'openvino')
    files = sorted(Path('out/calibration_set/images').glob('*.png'))
    images = np.stack([cv2.imread(str(path))[..., ::-1] for path in files])
    inputs = np.load('out/calibration_openvino/inputs.npy')
    # YOLOv5 takes RGB in [0, 1].
    np.testing.assert_allclose(inputs, images.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert json.loads(Path('out/calibration_openvino/preprocessing.json').read_text())['layout'] == 'openvino'
    made = [path.stat().st_mtime_ns for path in files]
    generate('--format', 'npy', '--format-dir', 'elsewhere')
    np.testing.assert_array_equal(np.load('elsewhere/images.npy'), images)
    assert [path.stat().st_mtime_ns for path in files] == made


def test_an_unknown_format_is_refused_before_images_are_made(generate: Any) -> None:
    with pytest.raises(SystemExit):
        generate('--format', 'tflite')
    assert not Path('out').exists()


def _float_file(path: Path) -> None:
    """A network of two convolutions on images of 32x32 pixels."""
    pytest.importorskip('onnx', exc_type=ImportError)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    options: Any = dict(input_names=['images'], output_names=['map'], opset_version=17, dynamo=False)
    torch.onnx.export(model, (torch.zeros(1, 3, 32, 32),), path, **options)


@pytest.fixture
def inputs_of_a_set(tmp_path: Path) -> np.ndarray:
    """What --format openvino and tensorrt write for a set of four drawn scenes."""
    images = np.stack([draw_scene(0, index, 32).image for index in range(4)])
    labels = [InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))] * 4
    made = CalibrationSet.open(tmp_path / 'set', fingerprint={}, num_images=4, shard_size=4, classes=('a',))
    made.write_shard(0, images, labels)
    made.merge()
    preprocessing = Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3, to_rgb=True)
    for name in ('openvino', 'tensorrt'):
        write_format(made, name, tmp_path / name, preprocessing)
    return np.load(tmp_path / 'tensorrt/inputs.npy', mmap_mode='r')


def _relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).mean() / np.abs(expected).mean())


def test_onnxruntime_calibrates_on_the_set(tmp_path: Path, inputs_of_a_set: np.ndarray) -> None:
    onnxruntime = pytest.importorskip('onnxruntime', exc_type=ImportError)
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    _float_file(tmp_path / 'float.onnx')

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs_of_a_set)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {'images': np.ascontiguousarray(image[None])}

    quantize_static(tmp_path / 'float.onnx', tmp_path / 'int8.onnx', Reader(), quant_format=QuantFormat.QDQ)
    outputs = []
    for name in ('float', 'int8'):
        session = onnxruntime.InferenceSession(tmp_path / f'{name}.onnx', providers=['CPUExecutionProvider'])
        outputs.append(session.run(None, {'images': np.ascontiguousarray(inputs_of_a_set[:1])})[0])
    assert 0 < _relative_difference(outputs[1], outputs[0]) < 0.05


def test_nncf_calibrates_on_the_set(tmp_path: Path, inputs_of_a_set: np.ndarray) -> None:
    nncf = pytest.importorskip('nncf', exc_type=ImportError)
    openvino = pytest.importorskip('openvino', exc_type=ImportError)
    _float_file(tmp_path / 'float.onnx')
    model = openvino.Core().read_model(tmp_path / 'float.onnx')
    quantized = nncf.quantize(model, nncf.Dataset([image[None] for image in inputs_of_a_set]))
    image = np.ascontiguousarray(inputs_of_a_set[:1])
    outputs = [openvino.compile_model(network, 'CPU')(image)[0] for network in (model, quantized)]
    assert 0 < _relative_difference(outputs[1], outputs[0]) < 0.05
