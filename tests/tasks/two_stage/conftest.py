# SPDX-License-Identifier: Apache-2.0
"""Small versions of MMDetection's two-stage configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet.models
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.tasks import TwoStageTask

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
SIZE = (96, 128)
RESNET = dict(
    type='ResNet', depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN')
)
SWIN = dict(type='SwinTransformer', embed_dims=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)


def small(
    base: str = '_base_/models/mask-rcnn_r50_fpn.py', backbone: dict[str, Any] = RESNET, **changes: Any
) -> nn.Module:
    """Build a detector with 3 classes and few channels; ``changes`` are dotted model keys with ``__`` for a dot."""
    cfg = Config.fromfile(CONFIGS / base)
    model = cfg.model
    model.pop('data_preprocessor')
    model.backbone = backbone
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    roi = model.roi_head
    if isinstance(roi.bbox_head, dict):
        roi.bbox_roi_extractor.out_channels = 16
        roi.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
    if roi.get('mask_head'):
        roi.mask_roi_extractor.out_channels = 16
        roi.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=3, num_convs=1)
    cfg.merge_from_dict({f'model.{key.replace("__", ".")}': value for key, value in changes.items()})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(cfg.model)
    # Large weights give confident boxes far from the anchors, with a wide range of IoUs with the labels.
    nn.init.normal_(detector.rpn_head.rpn_cls.weight, std=0.5)
    nn.init.normal_(detector.rpn_head.rpn_reg.weight, std=0.1)
    return detector


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    return small


@pytest.fixture(scope='module')
def task() -> TwoStageTask:
    """A Mask R-CNN with a small ResNet."""
    return TwoStageTask(small())


@pytest.fixture
def labels() -> list[InstanceData]:
    """Labels of four images with 2, 1, 0 and 3 objects, whose masks differ from their boxes."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for count in (2, 1, 0, 3):
        corner = torch.rand(count, 2, generator=generator) * 40
        side = 20 + torch.rand(count, 2, generator=generator) * 30
        masks = torch.zeros(count, *SIZE, dtype=torch.bool)
        bboxes = torch.cat((corner, corner + side), dim=1)
        for mask, (left, top, right, bottom) in zip(masks, bboxes.int().tolist(), strict=True):
            mask[top : bottom - 5, left + 9 : right] = True
        classes = torch.randint(3, (count,), generator=generator)
        entries.append(InstanceData(bboxes=bboxes, labels=classes, masks=masks))
    return entries
