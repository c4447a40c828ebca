# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from plain_yolo11 import PlainYOLO11
from plain_yolo26 import PlainYOLO26
from plain_yolov8 import PlainYOLOv8

from mmzsq.converters import yolov8
from mmzsq.converters.detectors import convert_detector
from mmzsq.converters.yolo11 import is_yolo11
from mmzsq.converters.yolo26 import SIZES, convert_yolo26, is_yolo26
from mmzsq.errors import UserError


def test_converted_weights_compute_the_same(repo: Path) -> None:
    register_all_modules()
    model = PlainYOLO26(*SIZES['n'], classes=3)
    converted = convert_yolo26(model.tensors())
    assert (converted.family, converted.size, converted.num_classes) == ('YOLO26', 'n', 3)
    cfg = Config.fromfile(repo / 'configs/yolo26/yolo26-n_coco.py').model
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
        tensors = PlainYOLO26(*SIZES[size], classes=1).tensors()
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}
    assert is_yolo26(tensors)
    assert convert_yolo26(tensors)[1:3] == (size, 1)


def test_only_the_branch_of_training_may_be_missing() -> None:
    tensors = PlainYOLO26(*SIZES['n'], classes=3).tensors()
    lean = {name: tensor for name, tensor in tensors.items() if not name.startswith(('model.23.cv2', 'model.23.cv3'))}
    assert len(lean) < len(tensors)
    assert convert_yolo26(lean).state_dict.keys() == convert_yolo26(tensors).state_dict.keys()
    name, ours = 'model.23.one2one_cv2.1.0.conv.weight', 'bbox_head.box_convs.1.0.conv.weight'
    with pytest.raises(UserError, match=f'missing {ours}'):
        convert_yolo26({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=r'unexpected model.23.cv4.weight'):
        convert_yolo26({**tensors, 'model.23.cv4.weight': torch.zeros(1)})
    with pytest.raises(UserError, match='not a YOLO26 detector'):
        convert_yolo26({'model.0.weight': torch.zeros(1)})


@pytest.mark.parametrize('plain', [PlainYOLOv8, PlainYOLO11, PlainYOLO26])
def test_the_family_is_found(plain: type[PlainYOLO11]) -> None:
    size = yolov8.SIZES['n'] if plain is PlainYOLOv8 else SIZES['n']
    tensors = plain(*size, classes=2).tensors()
    assert convert_detector(tensors).family == plain.__name__.removeprefix('Plain')
    assert (is_yolo11(tensors), is_yolo26(tensors)) == (plain is PlainYOLO11, plain is PlainYOLO26)


def test_tensors_with_anchors_are_taken_for_those_of_a_yolov5() -> None:
    with pytest.raises(UserError, match='not a YOLOv5 detector'):
        convert_detector({'model.0.conv.weight': torch.zeros(16, 3, 6, 6), 'model.24.anchors': torch.zeros(3, 3, 2)})
    with pytest.raises(UserError, match='or YOLOv5 with anchors'):
        convert_detector({'model.0.conv.weight': torch.zeros(16, 3, 6, 6)})
