# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLO11 to the names of this package, see :mod:`mmzsq.converters.families`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mmzsq.converters.families import Family
from mmzsq.models.yolo11.backbone import YOLO11CSPDarknet
from mmzsq.models.yolo11.head import YOLO11Head
from mmzsq.models.yolo11.neck import YOLO11PAFPN


class Size(NamedTuple):
    """Settings of a YOLO11 size."""

    deepen_factor: float
    widen_factor: float
    max_channels: int
    c3k_everywhere: bool


SIZES = {
    'n': Size(0.50, 0.25, 1024, False),
    's': Size(0.50, 0.50, 1024, False),
    'm': Size(0.50, 1.00, 512, True),
    'l': Size(1.00, 1.00, 512, True),
    'x': Size(1.00, 1.50, 512, True),
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
    'backbone.stage4.3': 'model.10',
    'neck.top_down_middle': 'model.13',
    'neck.top_down_fine': 'model.16',
    'neck.downsample_fine': 'model.17',
    'neck.bottom_up_middle': 'model.19',
    'neck.downsample_middle': 'model.20',
    'neck.bottom_up_coarse': 'model.22',
    'bbox_head': 'model.23',
}

ATTENTION = 'model.10.m.0.attn.qkv.conv.weight'
CLASSES = 'model.23.cv3.0.2.weight'
ONE_TO_ONE_CLASSES = 'model.23.one2one_cv3.0.2.weight'
"""Only YOLO26 has it."""


def build(size: Size, num_classes: int) -> dict[str, nn.Module]:
    """Build the parts of a YOLO11 by attribute name.

    Args:
        size: The size.
        num_classes: Number of classes.
    """
    return {
        'backbone': YOLO11CSPDarknet(*size),
        'neck': YOLO11PAFPN(*size),
        'bbox_head': YOLO11Head(num_classes, size.widen_factor, size.max_channels),
    }


YOLO11_FAMILY = Family(
    'YOLO11',
    SIZES,
    LAYERS,
    YOLO11CSPDarknet.stem_width,
    YOLO11CSPDarknet.depth,
    (CLASSES, ATTENTION),
    build,
    foreign=ONE_TO_ONE_CLASSES,
)

is_yolo11 = YOLO11_FAMILY.matches
convert_yolo11 = YOLO11_FAMILY.convert
