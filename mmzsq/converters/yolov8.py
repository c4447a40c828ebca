# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLOv8 to the names of this package, see :mod:`mmzsq.converters.families`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mmzsq.converters.families import Family
from mmzsq.models.yolov8.backbone import YOLOv8CSPDarknet
from mmzsq.models.yolov8.head import YOLOv8Head
from mmzsq.models.yolov8.neck import YOLOv8PAFPN


class Size(NamedTuple):
    """Settings of a YOLOv8 size."""

    deepen_factor: float
    widen_factor: float
    max_channels: int


SIZES = {
    'n': Size(0.33, 0.25, 1024),
    's': Size(0.33, 0.50, 1024),
    'm': Size(0.67, 0.75, 768),
    'l': Size(1.00, 1.00, 512),
    'x': Size(1.00, 1.25, 512),
}

LAYERS = {
    'backbone.stem': 'model.0',
    'backbone.stage1.0': 'model.1',
    'backbone.stage1.1': 'model.2',
    'backbone.stage2.0': 'model.3',
    'backbone.stage2.1': 'model.4',
    'backbone.stage3.0': 'model.5',
    'backbone.stage3.1': 'model.6',
    'backbone.stage4.0': 'model.7',
    'backbone.stage4.1': 'model.8',
    'backbone.stage4.2': 'model.9',
    'neck.top_down_middle': 'model.12',
    'neck.top_down_fine': 'model.15',
    'neck.downsample_fine': 'model.16',
    'neck.bottom_up_middle': 'model.18',
    'neck.downsample_middle': 'model.19',
    'neck.bottom_up_coarse': 'model.21',
    'bbox_head': 'model.22',
}

BLOCK = 'model.2.m.0.cv1.conv.weight'
CLASSES = 'model.22.cv3.0.2.weight'


def build(size: Size, num_classes: int) -> dict[str, nn.Module]:
    """Build the parts of a YOLOv8 by attribute name.

    Args:
        size: The size.
        num_classes: Number of classes.
    """
    return {
        'backbone': YOLOv8CSPDarknet(*size),
        'neck': YOLOv8PAFPN(*size),
        'bbox_head': YOLOv8Head(num_classes, size.widen_factor, size.max_channels),
    }


YOLOV8_FAMILY = Family(
    'YOLOv8', SIZES, LAYERS, YOLOv8CSPDarknet.stem_width, YOLOv8CSPDarknet.depths[0], (CLASSES, BLOCK), build
)

is_yolov8 = YOLOV8_FAMILY.matches
convert_yolov8 = YOLOV8_FAMILY.convert
