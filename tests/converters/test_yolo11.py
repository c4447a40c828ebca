# SPDX-License-Identifier: Apache-2.0
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from plain_yolo11 import PlainYOLO11
from torch import Tensor, nn

from mmzsq.checkpoint import load_from_local
from mmzsq.converters.yolo11 import SIZES, convert_yolo11, is_yolo11
from mmzsq.errors import UserError


@pytest.fixture
def plain() -> type[PlainYOLO11]:
    return PlainYOLO11


def build(repo: Path, size: str, classes: int) -> nn.Module:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolo11/yolo11-{size}_coco.py')
    cfg.model.bbox_head.num_classes = classes
    return MODELS.build(cfg.model).eval()


def test_converted_weights_compute_the_same(plain: Any, repo: Path) -> None:
    model = plain(*SIZES['n'], classes=3)
    tensors = model.tensors()
    images = torch.rand(1, 3, 64, 96)
    converted = convert_yolo11(tensors)
    assert (converted.family, converted.size, converted.num_classes) == ('YOLO11', 'n', 3)
    detector = build(repo, 'n', 3)
    detector.load_state_dict(converted.state_dict)
    with torch.no_grad():
        (maps,) = detector._forward(images)
    expected = model.forward(images)
    for level, expected_level in zip(maps, expected, strict=True):
        spread = expected_level.std(dim=(2, 3)).mean().item()
        torch.testing.assert_close(level, expected_level, rtol=0, atol=1e-3 * spread)


@pytest.mark.parametrize('size', list(SIZES))
def test_each_size_is_identified_by_its_shapes(plain: Any, size: str) -> None:
    with torch.device('meta'):
        tensors = plain(*SIZES[size], classes=1).tensors()
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}
    tensors['model.23.dfl.conv.weight'] = torch.arange(16.0).view(1, 16, 1, 1)
    assert is_yolo11(tensors)
    assert convert_yolo11(tensors)[1:3] == (size, 1)


def test_every_name_and_shape_is_checked(plain: Any) -> None:
    tensors = plain(*SIZES['n'], classes=3).tensors()
    name = 'model.6.m.0.cv3.conv.weight'
    ours = r'backbone.stage3.1.blocks.0.final_conv.conv.weight'
    with pytest.raises(UserError, match=f'missing {ours}'):
        convert_yolo11({key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=r'unexpected model.24.weight'):
        convert_yolo11({**tensors, 'model.24.weight': torch.zeros(1)})
    with pytest.raises(UserError, match=rf'{ours} has shape \(1,\)'):
        convert_yolo11({**tensors, name: torch.zeros(1)})
    with pytest.raises(UserError, match='YOLO11-n with batch norms .fused models cannot be converted'):
        convert_yolo11({key: tensor for key, tensor in tensors.items() if '.bn.' not in key})
    with pytest.raises(UserError, match='not a YOLO11 detector'):
        convert_yolo11({'model.0.weight': torch.zeros(1)})
    with pytest.raises(UserError, match='1 channels in the stem and 1 blocks in the first stage'):
        convert_yolo11({**tensors, 'model.0.conv.weight': torch.zeros(1, 3, 3, 3)})


def test_distances_other_than_whole_cells_are_rejected(plain: Any) -> None:
    tensors = plain(*SIZES['n'], classes=3).tensors()
    tensors['model.23.dfl.conv.weight'] = torch.arange(1, 17.0).view(1, 16, 1, 1)
    with pytest.raises(UserError, match=r'unexpected model.23.dfl.conv.weight'):
        convert_yolo11(tensors)


def test_a_checkpoint_is_converted_without_the_package(
    plain: Any, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = plain(*SIZES['n'], classes=2).tensors()
    torch.save({'model': None, 'ema': upstream_model(tensors, monkeypatch).half(), 'epoch': 3}, tmp_path / 'a.pt')
    for name in ('ultralytics', 'ultralytics.nn', 'ultralytics.nn.tasks'):
        monkeypatch.setitem(sys.modules, name, None)
    path = repo / 'tools/model_converters/ultralytics_to_mmzsq.py'
    spec = importlib.util.spec_from_file_location('ultralytics_to_mmzsq', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert ': YOLO11-n, 2 classes, 498 tensors, 2.6' in tool.convert(tmp_path / 'a.pt', tmp_path / 'a.safetensors')
    converted = load_from_local(str(tmp_path / 'a.safetensors'))
    assert converted['meta']['dataset_meta']['classes'] == ['cat', 'dog']
    state_dict = converted['state_dict']
    weight = state_dict['bbox_head.cls_convs.1.0.pointwise_conv.conv.weight']
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors['model.23.cv3.1.0.1.conv.weight'].half().float())
    assert state_dict['backbone.stem.bn.num_batches_tracked'].item() == 7


def upstream_model(tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A tree of modules that hold ``tensors``, of a package that exists only while a checkpoint is written."""
    module = types.ModuleType('ultralytics.nn.tasks')

    class DetectionModel(nn.Module):
        """Any node of the tree."""

    DetectionModel.__module__, DetectionModel.__qualname__ = module.__name__, 'DetectionModel'
    module.DetectionModel = DetectionModel
    for name in ('ultralytics', 'ultralytics.nn'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    root = DetectionModel()
    root.names = {1: 'dog', 0: 'cat'}
    root.criterion = {'device': torch.device('cpu')}
    for name, tensor in tensors.items():
        node = root
        *path, leaf = name.split('.')
        for part in path:
            if part not in node._modules:
                node.add_module(part, DetectionModel())
            node = node._modules[part]
        if leaf in ('weight', 'bias'):
            node.register_parameter(leaf, nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    return root
