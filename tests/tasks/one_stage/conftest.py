# SPDX-License-Identifier: Apache-2.0
"""Small versions of MMDetection's one-stage configs, and labels with edge cases."""

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

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
SIZE = (96, 128)
CLASSES = 3
GROUPS = dict(type='GN', num_groups=4)
DARKNET = {
    'model.backbone': dict(widen_factor=0.125, init_cfg=None),
    'model.neck': dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1),
    'model.bbox_head': dict(num_classes=CLASSES, in_channels=16, feat_channels=16),
}
RESNET = {
    'model.backbone': dict(depth=18, base_channels=8, frozen_stages=-1, init_cfg=None),
    'model.neck': dict(in_channels=[8, 16, 32, 64], out_channels=16),
    'model.bbox_head': dict(num_classes=CLASSES, in_channels=16, feat_channels=16, stacked_convs=1),
}
GROUPED = RESNET | {'model.bbox_head': RESNET['model.bbox_head'] | dict(norm_cfg=GROUPS)}
MOBILENET = {'model.backbone.init_cfg': None, 'model.bbox_head.num_classes': CLASSES}
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    'yolox': ('yolox/yolox_s_8xb8-300e_coco.py', DARKNET),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', DARKNET),
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco.py', RESNET),
    'atss': ('atss/atss_r50_fpn_1x_coco.py', GROUPED),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', GROUPED),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', GROUPED),
    'fcos_normalized': ('fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py', GROUPED),
    'yolov3': ('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', MOBILENET),
}
"""MMDetection's config and the overrides that make it small, by name."""
PREDICTORS = (
    'conv_cls',
    'conv_reg',
    'conv_obj',
    'rtm_cls',
    'rtm_reg',
    'retina_',
    'atss_',
    'gfl_',
    'conv_centerness',
    'pred',
)
"""Substrings in the names of a head's last layers."""


def small_cfg(name: str, **changes: Any) -> Any:
    """Return the config of a small detector; ``changes`` are dotted keys of its model, with ``__`` for a dot."""
    path, shrunk = DETECTORS[name]
    cfg = Config.fromfile(CONFIGS / path)
    cfg.merge_from_dict(shrunk)
    cfg.merge_from_dict({f'model.{key.replace("__", ".")}': value for key, value in changes.items()})
    return cfg.model


def spread(head: nn.Module) -> None:
    """Reinitialize the last layers of a head so that its boxes and scores vary widely."""
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Conv2d) and any(part in name for part in PREDICTORS):
            nn.init.normal_(layer.weight, std=0.1)
            nn.init.normal_(layer.bias, std=0.3)


def build_detector(name: str, **changes: Any) -> nn.Module:
    """Build a detector with 3 classes and few channels, whose BatchNorm statistics are those of noise images."""
    cfg = small_cfg(name, **changes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(cfg)
    spread(detector.bbox_head)
    layers = [layer for layer in detector.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.train().momentum = 1.0
    with torch.no_grad():
        detector.bbox_head(detector.extract_feat(torch.rand(4, 3, *SIZE) * 255))
    for layer in layers:
        layer.running_var.clamp_(min=0.3)
    return detector.eval()


def build_head(name: str, **changes: Any) -> nn.Module:
    """Build the head alone, as its detector would."""
    cfg = small_cfg(name, **changes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = MODELS.build(cfg.bbox_head | dict(train_cfg=cfg.get('train_cfg'), test_cfg=cfg.test_cfg))
    spread(head)
    return head


def draw_labels(counts: tuple[int, ...], side: tuple[float, float] = (8, 70), seed: int = 0) -> list[InstanceData]:
    """Draw ``counts`` boxes per image with sides in a range of pixels. They may overlap or extend past the image."""
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for count in counts:
        centers = torch.rand(count, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
        sides = side[0] + torch.rand(count, 2, generator=generator) * (side[1] - side[0])
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        entries.append(InstanceData(bboxes=torch.cat((centers - sides / 2, centers + sides / 2), 1), labels=labels))
    return entries


LABELS: dict[str, list[InstanceData]] = {
    'of_every_number': draw_labels((2, 1, 0, 30)),
    'none': draw_labels((0, 0, 0, 0)),
    'tiny': draw_labels((4, 1, 30, 0), side=(0.5, 3.0)),
    'twice': [InstanceData(bboxes=e.bboxes.repeat(2, 1), labels=e.labels.repeat(2)) for e in draw_labels((3, 1, 2, 5))],
    'larger_than_the_image': draw_labels((1, 2, 1, 3), side=(150, 300)),
}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    return build_detector


@pytest.fixture
def make_head() -> Callable[..., nn.Module]:
    return build_head


@pytest.fixture(params=sorted(DETECTORS))
def name(request: pytest.FixtureRequest) -> str:
    """Name of each detector in DETECTORS."""
    return str(request.param)


@pytest.fixture
def labels() -> Callable[..., list[InstanceData]]:
    """Function that draws labels."""
    return draw_labels


@pytest.fixture(params=sorted(LABELS))
def awkward_labels(request: pytest.FixtureRequest) -> list[InstanceData]:
    """Labels of four images, one edge case at a time."""
    return [entry.clone() for entry in LABELS[request.param]]
