# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmzsq.converters.yolo26 import SIZES
from mmzsq.models.yolo.layers import SPPF
from mmzsq.models.yolo11.layers import SpatialAttention

# Numbers of parameters that Ultralytics prints for 80 classes, with separate batch norms and both branches of the head.
PARAMETERS = {'n': 2572280, 's': 10009784, 'm': 21896248, 'l': 26299704, 'x': 58993368}


@pytest.mark.parametrize('size', list(SIZES))
def test_configs_build_each_size(size: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolo26/yolo26-{size}_coco.py')
    with torch.device('meta'):
        detector = MODELS.build(cfg.model)
    branch = sum(parameter.numel() for parameter in detector.bbox_head.parameters())
    both = sum(parameter.numel() for parameter in detector.parameters()) + branch
    assert both == PARAMETERS[size]
    assert not any(module.inplace for module in detector.modules() if isinstance(module, nn.SiLU))


def test_pooling_adds_its_input_and_activates_the_last_convolution_alone() -> None:
    block = SPPF(8, 8, residual=True).eval()
    assert not block.conv1.with_activation and block.conv2.with_activation
    x = torch.randn(1, 8, 6, 6)
    plain = SPPF(8, 8).eval()
    plain.load_state_dict(block.state_dict())
    plain.conv1.with_activation = False
    torch.testing.assert_close(block(x), x + plain(x))


def test_the_neck_has_attention_at_the_coarsest_output(detector: nn.Module) -> None:
    places = [name for name, module in detector.neck.named_modules() if isinstance(module, SpatialAttention)]
    assert places == ['bottom_up_coarse.blocks.0.1.attn']
