# SPDX-License-Identifier: Apache-2.0
"""Ultralytics' weights of YOLO11 under the names of this project's parts.

The size (n, s, m, l or x) and the number of classes are read off the shapes; every tensor's name and shape is then
compared with the model of that size, and none may be missing or left over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.converters.conversion import ConvertedDetector, check_tensors, tensor_shapes, to_float32
from mmzsq.errors import UserError
from mmzsq.models.yolo.layers import scale_depth, scale_width
from mmzsq.models.yolo11.backbone import YOLO11CSPDarknet
from mmzsq.models.yolo11.head import YOLO11Head
from mmzsq.models.yolo11.neck import YOLO11PAFPN


class Size(NamedTuple):
    """What makes a size of YOLO11."""

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
"""How names inside a layer differ, to be replaced in this order."""

ATTENTION = 'model.10.m.0.attn.qkv.conv.weight'
CLASSES = 'model.23.cv3.0.2.weight'
DISTANCES = 'model.23.dfl.conv.weight'


def is_yolo11(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors by Ultralytics' names have attention and a head where YOLO11 has them."""
    return ATTENTION in tensors and CLASSES in tensors


def convert_yolo11(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename Ultralytics' tensors and check them.

    Args:
        tensors: Parameters and buffers by Ultralytics' names, with batch norms not yet folded.

    Returns:
        Weights for :class:`~mmzsq.models.yolo11.YOLO11`; ``size`` is a key of :data:`SIZES`.

    Raises:
        UserError: If they are not those of a YOLO11; the message names tensors that are missing, left over, or of
            another shape.
    """
    size, num_classes = _detect(tensors)
    expected = expected_shapes(SIZES[size], num_classes)
    names = {_upstream_name(name): name for name in expected}
    state_dict = {names.get(name, name): tensor for name, tensor in tensors.items() if not _counts(name, tensor)}
    check_tensors(state_dict, expected, f'YOLO11-{size}')
    return ConvertedDetector('YOLO11', size, num_classes, to_float32(state_dict))


def expected_shapes(size: Size, num_classes: int) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a YOLO11, without allocating one.

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
    """Translate the name of a tensor of this project's YOLO11."""
    layer = next(layer for layer in LAYERS if name.startswith(f'{layer}.'))
    inside = name.removeprefix(layer)
    for pattern, replacement in INSIDE:
        inside = re.sub(pattern, replacement, inside)
    return LAYERS[layer] + inside


def _counts(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the distances 0, 1, ..., which are no weights here."""
    return name == DISTANCES and torch.equal(tensor.flatten().float(), torch.arange(float(tensor.numel())))


def _detect(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Read size and number of classes off the shapes."""
    try:
        width = tensors['model.0.conv.weight'].shape[0]
        num_classes = tensors[CLASSES].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError('this is no YOLO11 detector (no stem or head found where that model has them)') from error
    depth = sum(re.fullmatch(r'model\.2\.m\.\d+\.cv1\.conv\.weight', name) is not None for name in tensors)
    for key, size in SIZES.items():
        stem = YOLO11CSPDarknet.stem_width, YOLO11CSPDarknet.depth
        if (width, depth) == (scale_width(stem[0], size.widen_factor), scale_depth(stem[1], size.deepen_factor)):
            return key, num_classes
    raise UserError(
        f'a stem of {width} channels and {depth} blocks in the first C3k2 are of none of the sizes {", ".join(SIZES)}'
    )
