# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from plain_yolo11 import PlainYOLO11
from plain_yolov8 import PlainYOLOv8
from torch import Tensor

from mmzsq.converters import yolo11
from mmzsq.converters.yolov8 import SIZES, convert_yolov8, is_yolov8
from mmzsq.errors import UserError


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Random tensors of size n with three classes."""
    return PlainYOLOv8(*SIZES['n'], classes=3).tensors()


def test_converted_weights_compute_the_same(repo: Path) -> None:
    register_all_modules()
    model = PlainYOLOv8(*SIZES['n'], classes=3)
    converted = convert_yolov8(model.tensors())
    assert (converted.family, converted.size, converted.num_classes) == ('YOLOv8', 'n', 3)
    cfg = Config.fromfile(repo / 'configs/yolov8/yolov8-n_coco.py').model
    cfg.bbox_head.num_classes = 3
    detector = MODELS.build(cfg).eval()
    detector.load_state_dict(converted.state_dict)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        (maps,) = detector(images, mode='tensor')
    for level, expected in zip(maps, model.forward(images), strict=True):
        spread = expected.std(dim=(2, 3)).mean().item()
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-3 * spread)


@pytest.mark.parametrize('size', list(SIZES))
def test_each_size_is_identified_by_its_shapes(size: str) -> None:
    with torch.device('meta'):
        tensors = PlainYOLOv8(*SIZES[size], classes=1).tensors()
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}
    tensors['model.22.dfl.conv.weight'] = torch.arange(16.0).view(1, 16, 1, 1)
    assert is_yolov8(tensors)
    assert convert_yolov8(tensors)[1:3] == (size, 1)


def test_every_name_and_shape_is_checked(tensors: dict[str, Tensor]) -> None:
    name, ours = 'model.6.m.1.cv2.conv.weight', 'backbone.stage3.1.blocks.1.conv2.conv.weight'
    with pytest.raises(UserError, match=f'missing {ours}'):
        convert_yolov8({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=r'unexpected model.23.weight'):
        convert_yolov8({**tensors, 'model.23.weight': torch.zeros(1)})
    with pytest.raises(UserError, match=rf'{ours} has shape \(1,\)'):
        convert_yolov8({**tensors, name: torch.zeros(1)})
    with pytest.raises(UserError, match='YOLOv8-n with batch norms .fused models cannot be converted'):
        convert_yolov8({key: tensor for key, tensor in tensors.items() if '.bn.' not in key})
    with pytest.raises(UserError, match='not a YOLOv8 detector'):
        convert_yolov8({'model.0.weight': torch.zeros(1)})


def test_the_families_are_told_apart(tensors: dict[str, Tensor]) -> None:
    other = PlainYOLO11(*yolo11.SIZES['n'], classes=3).tensors()
    assert (is_yolov8(tensors), yolo11.is_yolo11(tensors)) == (True, False)
    assert (is_yolov8(other), yolo11.is_yolo11(other)) == (False, True)
