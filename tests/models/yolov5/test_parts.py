# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmzsq.converters.yolov5 import SIZES, expected_shapes
from mmzsq.models.yolo.layers import SPPF
from mmzsq.models.yolov5 import YOLOv5CSPDarknet

# Numbers that Ultralytics prints for 80 classes, with separate batch norms.
PARAMETERS = {'n': 1872157, 's': 7235389, 'm': 21190557, 'l': 46563709, 'x': 86749405}


@pytest.mark.parametrize('size', list(SIZES))
def test_configs_build_each_size(size: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolov5/yolov5-{size}_coco.py')
    with torch.device('meta'):
        detector = MODELS.build(cfg.model)
    assert sum(parameter.numel() for parameter in detector.parameters()) == PARAMETERS[size]
    shapes = {name: tensor.shape for name, tensor in detector.state_dict().items()}
    assert shapes == expected_shapes(SIZES[size], 80)
    assert cfg.default_scope == 'mmdet'
    assert cfg.test_evaluator.type == 'CocoMetric'


def test_sppf_pools_by_5_9_and_13() -> None:
    sppf = SPPF(8, 8).eval()
    seen = {}
    sppf.conv2.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x = torch.randn(1, 8, 20, 16)
    sppf(x)
    y = sppf.conv1(x)
    pooled = [y] + [nn.functional.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
    torch.testing.assert_close(seen['x'], torch.cat(pooled, dim=1))


def test_activations_leave_the_output_of_the_norm_as_it_was() -> None:
    backbone = YOLOv5CSPDarknet(0.33, 0.125)
    activations = [module for module in backbone.modules() if isinstance(module, nn.SiLU)]
    assert activations
    assert not any(module.inplace for module in activations)
