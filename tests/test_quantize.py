# SPDX-License-Identifier: Apache-2.0
"""``mmzsq.quantize`` from a file of another project to a verified ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torchvision.models import detection

from mmzsq import quantize
from mmzsq.config import compose
from mmzsq.converters.files import convert_file
from mmzsq.errors import UserError

SMALL = (
    *('zsq.calibration_set.num_images=2', 'zsq.train.init_batches=1', 'zsq.train.num_workers=0'),
    'zsq.train.batch_size=2',
)


def sized(pixels: int) -> list[str]:
    """Return settings for square images."""
    scale = f'dataset.pipeline.1.scale=({pixels},{pixels})'
    return [
        *SMALL,
        f'zsq.synthesis.synthesize.image_size={pixels}',
        f'test_dataloader.{scale}',
        f'val_dataloader.{scale}',
    ]


def test_without_a_target_it_stops_after_the_student_and_prints_the_export(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantize.export, 'main', lambda _: pytest.fail('it exports'))
    quantize.main([str(shared / 'weights/yolov5n.pt'), '--preset', 'instant', '--cfg-options', *sized(64)])
    out = tmp_path / 'work_dirs/yolov5n_w8a8'
    leaf = (out / 'yolov5n_w8a8.py').read_text()
    assert leaf.startswith("_base_ = ['mmzsq::yolov5/yolov5-n_coco.py', 'mmzsq::_base_/zsq_w8a8.py']\nload_from = ")
    assert len(leaf.splitlines()) == 3
    assert quantize.last_student(out / 'run') == out / 'run/epoch_0.pth'
    command = 'python -m mmzsq.export work_dirs/yolov5n_w8a8/yolov5n_w8a8.py work_dirs/yolov5n_w8a8/run/epoch_0.pth'
    assert command in capsys.readouterr().out


@pytest.mark.nightly
def test_one_command_from_an_ultralytics_file_to_a_verified_onnx_file(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('onnxruntime')
    monkeypatch.chdir(tmp_path)
    weights = str(shared / 'weights/yolov5n.pt')
    quantize.main([weights, '--preset', 'instant', '--target', 'onnxruntime', '--cfg-options', *sized(256)])
    out = tmp_path / 'work_dirs/yolov5n_w8a8'
    assert (out / 'yolov5n_w8a8.onnx').is_file()
    (entry,) = json.loads((out / 'deploy.json').read_text()).values()
    assert entry['runtimes']['onnxruntime']


@pytest.mark.parametrize('own_classes', [False, True])
def test_the_config_of_torchvision_weights_fits_them(tmp_path: Path, own_classes: bool) -> None:
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3 if own_classes else 91)
    path = tmp_path / 'mask.pth'
    torch.save({'model': model.state_dict(), 'epoch': 1}, path)
    detector = convert_file(path, ['cell', 'nucleus'] if own_classes else None)
    assert detector.classes[0] == ('cell' if own_classes else 'person')
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(quantize.leaf_config(detector, path, 'w4a8', 'instant', 'onnxruntime'))
    cfg = Config.fromfile(leaf)
    register_all_modules()
    with torch.device('meta'):
        shapes = {name: value.shape for name, value in MODELS.build(cfg.model).state_dict().items()}
    assert shapes == {name: value.shape for name, value in detector.converted.state_dict.items()}
    composed = compose(cfg)
    assert composed.zsq.preset == 'instant'
    assert (composed.zsq.quantizer.w_bits, composed.zsq.quantizer.target) == (4, 'onnxruntime')
    if own_classes:
        assert composed.test_dataloader.dataset.metainfo.classes == ['cell', 'nucleus']


def test_a_wrong_file_ends_in_one_message_that_lists_supported_detectors(tmp_path: Path) -> None:
    path = tmp_path / 'other.pth'
    torch.save({'fc.weight': torch.zeros(2, 2)}, path)
    for file in (path, tmp_path / 'missing.pt'):
        with pytest.raises(UserError, match=rf'{file.name}.*YOLOv5.*fasterrcnn_resnet50_fpn'):
            quantize.main([str(file)])
