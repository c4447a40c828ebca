# SPDX-License-Identifier: Apache-2.0
"""Files that users have: every form of supported weights is read, and all others end in one message."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_yolo11 import PlainYOLO11
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from mmzsq.converters.files import convert_file
from mmzsq.converters.ultralytics import model_of, read_archive
from mmzsq.converters.yolo11 import SIZES, convert_yolo11
from mmzsq.errors import UserError


@pytest.fixture(scope='module')
def tensors() -> dict[str, Tensor]:
    """A YOLO11-n under Ultralytics' names, with values that float16 holds."""
    torch.manual_seed(0)
    found = PlainYOLO11(*SIZES['n'], classes=2).tensors()
    return {name: x.half().to(x.dtype) if x.is_floating_point() else x for name, x in found.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f'{prefix}{name}': tensor for name, tensor in tensors.items()}


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    'state dict': lambda tensors: tensors,
    'float16': lambda tensors: {name: x.half() if x.is_floating_point() else x for name, x in tensors.items()},
    'DataParallel': lambda tensors: prefixed(tensors, 'module.'),
    'Lightning': lambda tensors: dict(state_dict=prefixed(tensors, 'model.'), epoch=3),
    'training script': lambda tensors: dict(model=tensors, optimizer=dict(state={}), args=argparse.Namespace(lr=0.1)),
    'average': lambda tensors: dict(
        model=zeros(tensors), model_ema={**prefixed(tensors, 'module.'), 'n_averaged': torch.tensor(3)}
    ),
}


@pytest.mark.parametrize('form', [*FORMS, 'old format', 'safetensors'])
def test_every_form_of_a_state_dict_is_read(tensors: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    path = tmp_path / 'my.pt'
    if form == 'safetensors':
        path = tmp_path / 'my.safetensors'
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    elif form == 'old format':
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(FORMS[form](tensors), path)
    detector = convert_file(path)
    assert (detector.converted.family, detector.classes) == ('YOLO11', ('class_0', 'class_1'))
    expected = convert_yolo11(tensors).state_dict
    assert detector.converted.state_dict.keys() == expected.keys()
    assert all(torch.equal(detector.converted.state_dict[name], x) for name, x in expected.items())


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_pickled_module_tells_its_epsilon(tmp_path: Path, wrapped: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4, eps=0.0))
    torch.save(nn.DataParallel(model) if wrapped else model, tmp_path / 'my.pt')
    found = model_of(read_archive(tmp_path / 'my.pt'), tmp_path / 'my.pt')
    assert found.epsilons == {0.0}
    assert found.kind == 'Sequential'
    assert found.tensors.keys() == model.state_dict().keys()


def write(path: Path, content: Any) -> None:
    """Write what a test describes: bytes, a folder, or an object to save."""
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, torch.jit.ScriptModule):
        content.save(str(path))
    else:
        torch.save(content, path)


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('my.pt', b'', 'is no checkpoint: it is empty'),
        ('my.pt', b'no checkpoint', 'is no checkpoint'),
        ('my.pt', None, 'is a folder'),
        ('my.onnx', b'\x08\x08', 'is an exported model. Give the file that it was exported from'),
        ('my.pt', torch.jit.script(nn.ReLU()), 'is an exported model'),
        ('my.pt', [1, 2], 'it contains a list'),
        ('my.pt', {'epoch': 3}, 'it contains no weights by name'),
        ('my.pt', named('fc.weight'), 'its tensors have other names'),
        ('my.pt', named('model.0.conv.weight', 'model.22.proto.cv1.conv.weight'), 'head of a segmentation model'),
        ('my.pt', named('model.0.conv.weight', 'model.23.cv4.0.0.conv.weight'), 'head of a model of poses'),
        ('my.pt', named('model.0.conv.weight', 'model.10.linear.weight'), 'head of a classifier'),
        ('my.pt', named('model.0.stem1.conv.weight', 'model.28.decoder.x'), 'head of an RT-DETR'),
        ('my.pt', named('model.0.conv.weight', 'model.2.cv4.conv.weight'), 'not the weights of a YOLOv8, YOLO11'),
        ('my.pth', named('backbone.features.0.weight', 'head.x'), 'an SSD of torchvision'),
        ('my.pth', named('backbone.body.0.0.weight', 'backbone.fpn.x'), 'another backbone than ResNet-50'),
    ],
)
def test_other_files_end_in_one_message(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf'{name}.*{message}.*YOLO26 for detection, or .*retinanet_resnet50_fpn'):
        convert_file(tmp_path / name)


def test_an_epsilon_is_refused_for_ultralytics(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / 'my.pt')
    with pytest.raises(UserError, match='--batch-norm-eps is for weights of torchvision'):
        convert_file(tmp_path / 'my.pt', eps=1e-5)


def test_a_wrong_number_of_names_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / 'my.pt')
    with pytest.raises(UserError, match='has 2 classes, but --classes gives 3 names'):
        convert_file(tmp_path / 'my.pt', ['a', 'b', 'c'])
