# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from plain_yolov5 import PlainYOLOv5
from torch import nn
from torchvision.ops import nms

from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.converters.yolov5 import SIZES, convert_yolov5
from mmzsq.errors import UserError


@pytest.fixture
def plain() -> type[PlainYOLOv5]:
    return PlainYOLOv5


def build(repo: Path, size: str, classes: int) -> nn.Module:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolov5/yolov5-{size}_coco.py')
    cfg.model.bbox_head.num_classes = classes
    return MODELS.build(cfg.model).eval()


def test_converted_weights_compute_the_same(plain, repo: Path) -> None:
    tensors = plain.tensors(classes=3)
    images = torch.rand(1, 3, 64, 96)
    converted = convert_yolov5(tensors)
    assert (converted.size, converted.num_classes) == ('n', 3)
    detector = build(repo, 'n', 3)
    detector.load_state_dict(converted.state_dict)
    with torch.no_grad():
        (maps,) = detector._forward(images)
    expected = plain.forward(tensors, images)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    assert detector.bbox_head.anchors.tolist() == [[list(a) for a in s] for s in plain.anchors]


@pytest.mark.parametrize('size', list(SIZES))
def test_each_size_is_identified_by_its_shapes(plain, size: str) -> None:
    depth, width = SIZES[size]
    with torch.device('meta'):
        tensors = plain.tensors(width, depth, classes=1)
    converted = convert_yolov5({n: torch.zeros(()).expand(t.shape) for n, t in tensors.items()})
    assert (converted.size, converted.num_classes) == (size, 1)


def test_half_precision_becomes_single_and_counters_stay_integers(plain) -> None:
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in plain.tensors().items()}
    state_dict = convert_yolov5(tensors).state_dict
    assert state_dict['backbone.stem.conv.weight'].dtype == torch.float32
    assert state_dict['backbone.stem.bn.num_batches_tracked'].item() == 7


def test_the_second_copy_of_the_anchors_is_dropped_only_if_it_agrees(plain) -> None:
    tensors = plain.tensors()
    pixels = torch.tensor(plain.anchors, dtype=torch.float32).view(3, 1, 3, 1, 1, 2)
    convert_yolov5({**tensors, 'model.24.anchor_grid': pixels})
    with pytest.raises(UserError, match='unexpected bbox_head.anchor_grid'):
        convert_yolov5({**tensors, 'model.24.anchor_grid': pixels + 1})


def test_every_name_and_shape_is_checked(plain) -> None:
    tensors = plain.tensors()
    name = 'model.13.m.0.cv2.conv.weight'
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(UserError, match=r'missing neck.top_down_middle.blocks.0.conv2.conv.weight'):
        convert_yolov5(missing)
    with pytest.raises(UserError, match=r'unexpected model.25.weight'):
        convert_yolov5({**tensors, 'model.25.weight': torch.zeros(1)})
    with pytest.raises(UserError, match=r'blocks.0.conv2.conv.weight has shape \(1,\)'):
        convert_yolov5({**tensors, name: torch.zeros(1)})
    with pytest.raises(UserError, match='fused models cannot be converted'):
        convert_yolov5({key: tensor for key, tensor in tensors.items() if '.bn.' not in key})
    with pytest.raises(UserError, match=r'not a YOLOv5 detector of v6\.0'):
        convert_yolov5({'model.0.weight': torch.zeros(1)})
    with pytest.raises(UserError, match='1 channels in the stem and 1 bottlenecks in the first stage'):
        convert_yolov5({**tensors, 'model.0.conv.weight': torch.zeros(1, 3, 6, 6)})


def test_real_weights_detect_the_same_as_a_plain_implementation(plain, repo: Path, shared: Path) -> None:
    source = read_ultralytics(shared / 'weights/yolov5n.pt')
    assert source.classes[:2] == ('person', 'bicycle')
    detector = build(repo, 'n', 80)
    detector.load_state_dict(convert_yolov5(source.tensors).state_dict)
    cfg = Config.fromfile(repo / 'configs/yolov5/yolov5-n_coco.py').test_dataloader.dataset
    cfg.data_root = str(shared / 'data/coco_mini')
    dataset = DATASETS.build(cfg)
    for index in (0, 1):
        with torch.no_grad():
            (sample,) = detector.test_step(pseudo_collate([dataset[index]]))
            image = dataset[index]['inputs'][None].flip(1) / 255
            maps = plain.forward(source.tensors, image)
        bboxes, scores = plain.decode(maps, 80)
        expected = []
        height, width = sample.ori_shape
        ratio = min(640 / height, 640 / width)
        pad_x, pad_y = (640 - round(width * ratio)) // 2, (640 - round(height * ratio)) // 2
        for label in range(80):
            likely = (scores[0, :, label] > 0.3).nonzero().flatten()
            kept = likely[nms(bboxes[0, likely], scores[0, likely, label], 0.6)]
            for x1, y1, x2, y2, score in torch.cat((bboxes[0, kept], scores[0, kept, label, None]), dim=1).tolist():
                box = ((x1 - pad_x) / ratio, (y1 - pad_y) / ratio)
                box += ((x2 - pad_x) / ratio, (y2 - pad_y) / ratio)
                expected.append((score, label, *box))
        expected.sort(reverse=True)
        result = sample.pred_instances
        sure = result.scores > 0.3
        assert sure.sum() == len(expected) > 0
        values = torch.tensor(expected)
        torch.testing.assert_close(result.scores[sure], values[:, 0], rtol=1e-3, atol=1e-3)
        assert result.labels[sure].tolist() == values[:, 1].tolist()
        limit = torch.tensor([width, height, width, height])
        clipped = values[:, 2:].clamp(min=0).minimum(limit)
        torch.testing.assert_close(result.bboxes[sure], clipped, rtol=0, atol=0.5)
