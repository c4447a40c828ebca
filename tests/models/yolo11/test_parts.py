# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn
from torch.nn import functional as F

from mmzsq.converters.yolo11 import SIZES
from mmzsq.models.yolo11 import YOLO11Head
from mmzsq.models.yolo11.layers import C3k, C3k2, SpatialAttention

# Numbers of parameters that Ultralytics prints as trainable for 80 classes, with separate batch norms.
PARAMETERS = {'n': 2624064, 's': 9458736, 'm': 20114672, 'l': 25372144, 'x': 56966160}


@pytest.mark.parametrize('size', list(SIZES))
def test_configs_build_each_size(size: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolo11/yolo11-{size}_coco.py')
    with torch.device('meta'):
        detector = MODELS.build(cfg.model)
    assert sum(parameter.numel() for parameter in detector.parameters()) == PARAMETERS[size]
    assert cfg.default_scope == 'mmdet'
    assert cfg.test_evaluator.type == 'CocoMetric'


@pytest.mark.parametrize(('classes', 'channels'), [(3, 64), (80, 80), (365, 100)])
def test_the_width_of_the_head_follows_the_classes_within_limits(classes: int, channels: int) -> None:
    head = YOLO11Head(classes, widen_factor=0.25, max_channels=1024)
    assert {convs[2].in_channels for convs in head.cls_convs} == {channels}
    assert {convs[2].in_channels for convs in head.box_convs} == {64}


def test_features_have_the_strides_of_the_head(detector: nn.Module) -> None:
    (maps,) = detector(torch.rand(2, 3, 64, 96), mode='tensor')
    assert [tuple(m.shape) for m in maps] == [(2, 67, 8, 12), (2, 67, 4, 6), (2, 67, 2, 3)]


def test_attention_is_scaled_dot_product_attention() -> None:
    attention = SpatialAttention(128).eval()
    x = torch.randn(2, 128, 3, 5)
    query, key, value = attention.split(x)
    assert query.shape == (2, 2, 15, 32) and key.shape == (2, 2, 32, 15) and value.shape == (2, 2, 15, 64)
    expected = F.scaled_dot_product_attention(query, key.mT, value, scale=1.0)
    raw_query = attention.qkv(x)[:, :32].flatten(2).mT
    torch.testing.assert_close(query[:, 0] * 32**0.5, raw_query)
    torch.testing.assert_close(attention(x), attention.merge(expected, value, x))


def test_the_positional_encoding_is_a_convolution_of_the_values() -> None:
    attention = SpatialAttention(64).eval()
    value = torch.randn(1, 1, 6, 64)
    x = torch.empty(1, 64, 2, 3)
    as_map = value[0, 0].T.reshape(1, 64, 2, 3)
    merged = attention.merge(torch.zeros_like(value), value, x)
    torch.testing.assert_close(merged, attention.proj(attention.position(as_map)))


def test_blocks_are_chained_and_the_last_convolution_gets_all_outputs() -> None:
    block = C3k2(8, 8, num_blocks=2, c3k=True)
    assert all(isinstance(inner, C3k) for inner in block.blocks)
    seen = {}
    block.final_conv.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    x = torch.randn(2, 8, 4, 4)
    block.eval()(x)
    first, second = block.main_conv(x).chunk(2, 1)
    third = block.blocks[0](second)
    torch.testing.assert_close(seen['x'], torch.cat((first, second, third, block.blocks[1](third)), 1))


def test_activations_leave_the_output_of_the_norm_as_it_was(detector: nn.Module) -> None:
    activations = [module for module in detector.modules() if isinstance(module, nn.SiLU)]
    assert activations
    assert not any(module.inplace for module in activations)
