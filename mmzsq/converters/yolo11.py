# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLO11 to the names of this package.

The size (n, s, m, l or x) and the number of classes follow from tensor shapes. Then the name and shape of every tensor
are checked against the model of that size. Missing and unexpected tensors are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.converters.conversion import (
    ConvertedDetector,
    check_num_classes,
    check_tensors,
    find_size,
    tensor_shapes,
    to_float32,
)
from mmzsq.errors import UserError
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
INSIDE = (
    (r'\.box_convs\.', '.cv2.'),
    (r'\.cls_convs\.', '.cv3.'),
    (r'\.depthwise_conv\.', '.0.'),
    (r'\.pointwise_conv\.', '.1.'),
    (r'\.main_conv\.', '.cv1.'),
    (r'\.short_conv\.', '.cv2.'),
    (r'(\.blocks\.\d+)\.final_conv\.', r'\1.cv3.'),
    (r'\.final_conv\.', '.cv2.'),
    (r'\.conv(\d)\.', r'.cv\1.'),
    (r'\.blocks\.', '.m.'),
    (r'\.position\.', '.pe.'),
)
"""Patterns and replacements for names inside a layer, applied in this order."""

ATTENTION = 'model.10.m.0.attn.qkv.conv.weight'
CLASSES = 'model.23.cv3.0.2.weight'
DISTANCES = 'model.23.dfl.conv.weight'


def is_yolo11(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors under Ultralytics' names have the attention and the head of a YOLO11."""
    return ATTENTION in tensors and CLASSES in tensors


def convert_yolo11(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename Ultralytics' tensors and check them.

    Args:
        tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

    Returns:
        Weights of a :class:`~mmzsq.models.yolo11.YOLO11`; ``size`` is a key of :data:`SIZES`.

    Raises:
        UserError: If they are not the weights of a YOLO11. The message lists tensors that are missing, unexpected or of
            the wrong shape.
    """
    size, num_classes = _detect(tensors)
    expected = expected_shapes(SIZES[size], num_classes)
    names = {_upstream_name(name): name for name in expected}
    state_dict = {
        names.get(name, name): tensor for name, tensor in tensors.items() if not _is_distance_constant(name, tensor)
    }
    check_tensors(state_dict, expected, f'YOLO11-{size}')
    return ConvertedDetector('YOLO11', size, num_classes, to_float32(state_dict))


def expected_shapes(size: Size, num_classes: int) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a YOLO11, without allocating memory.

    Args:
        size: The size.
        num_classes: Number of classes.
    """
    with torch.device('meta'):
        return tensor_shapes(
            {
                'backbone': YOLO11CSPDarknet(*size),
                'neck': YOLO11PAFPN(*size),
                'bbox_head': YOLO11Head(num_classes, size.widen_factor, size.max_channels),
            }
        )


def _upstream_name(name: str) -> str:
    """Convert the name of a tensor in this package to Ultralytics' name."""
    layer = next(layer for layer in LAYERS if name.startswith(f'{layer}.'))
    inside = name.removeprefix(layer)
    for pattern, replacement in INSIDE:
        inside = re.sub(pattern, replacement, inside)
    return LAYERS[layer] + inside


def _is_distance_constant(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is the constant 0, 1, ... of the distances, which is not a weight in this package."""
    return name == DISTANCES and torch.equal(tensor.flatten().float(), torch.arange(float(tensor.numel())))


def _detect(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Derive the size and the number of classes from tensor shapes."""
    try:
        width = tensors['model.0.conv.weight'].shape[0]
        num_classes = tensors[CLASSES].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError('this is not a YOLO11 detector: it lacks the stem or the head of that model') from error
    check_num_classes(num_classes)
    depth = sum(re.fullmatch(r'model\.2\.m\.\d+\.cv1\.conv\.weight', name) is not None for name in tensors)
    stem_width, stage_depth = YOLO11CSPDarknet.stem_width, YOLO11CSPDarknet.depth
    return find_size(SIZES, stem_width, stage_depth, width, depth, 'YOLO11', 'blocks'), num_classes
