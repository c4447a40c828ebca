# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmzsq.converters.yolov8 import SIZES
from mmzsq.models.yolo.layers import Bottleneck
from mmzsq.models.yolov8 import YOLOv8Head, YOLOv8PAFPN
from mmzsq.models.yolov8.layers import bottleneck_c2f

# Numbers of parameters that Ultralytics prints as trainable for 80 classes, with separate batch norms.
PARAMETERS = {'n': 3157184, 's': 11166544, 'm': 25902624, 'l': 43691504, 'x': 68229632}


@pytest.mark.parametrize('size', list(SIZES))
def test_configs_build_each_size(size: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolov8/yolov8-{size}_coco.py')
    with torch.device('meta'):
        detector = MODELS.build(cfg.model)
    assert sum(parameter.numel() for parameter in detector.parameters()) == PARAMETERS[size]
    assert not any(module.inplace for module in detector.modules() if isinstance(module, nn.SiLU))


def test_the_classes_have_plain_convolutions() -> None:
    head = YOLOv8Head(80, widen_factor=0.25, max_channels=1024)
    hidden = [convs[index] for convs in head.cls_convs for index in (0, 1)]
    assert all(type(conv) is ConvModule and conv.conv.groups == 1 and conv.out_channels == 80 for conv in hidden)


def test_bottlenecks_of_the_neck_have_no_residual() -> None:
    neck = YOLOv8PAFPN(deepen_factor=0.33, widen_factor=0.125)
    blocks = [module for module in neck.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 4
    assert not any(block.add_identity for block in blocks)


@pytest.mark.parametrize('add_identity', [False, True])
def test_bottlenecks_are_chained(add_identity: bool) -> None:
    block = bottleneck_c2f(8, 8, 2, add_identity, dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU'))).eval()
    seen = {}
    block.final_conv.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x = torch.randn(2, 8, 4, 4)
    block(x)
    parts = list(block.main_conv(x).chunk(2, 1))
    for inner in block.blocks:
        parts.append(inner.conv2(inner.conv1(parts[-1])) + add_identity * parts[-1])
    torch.testing.assert_close(seen['x'], torch.cat(parts, 1))
