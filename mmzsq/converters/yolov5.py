# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLOv5 v6.0 and later to the names of this package.

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
from mmzsq.models.yolov5.backbone import YOLOv5CSPDarknet
from mmzsq.models.yolov5.head import YOLOv5Head
from mmzsq.models.yolov5.neck import YOLOv5PAFPN


class Size(NamedTuple):
    """Scale factors of a YOLOv5 size."""

    deepen_factor: float
    widen_factor: float


SIZES = {
    'n': Size(0.33, 0.25),
    's': Size(0.33, 0.50),
    'm': Size(0.67, 0.75),
    'l': Size(1.00, 1.00),
    'x': Size(1.33, 1.25),
}

LAYERS = {
    'model.0': 'backbone.stem',
    'model.1': 'backbone.stage1.0',
    'model.2': 'backbone.stage1.1',
    'model.3': 'backbone.stage2.0',
    'model.4': 'backbone.stage2.1',
    'model.5': 'backbone.stage3.0',
    'model.6': 'backbone.stage3.1',
    'model.7': 'backbone.stage4.0',
    'model.8': 'backbone.stage4.1',
    'model.9': 'backbone.stage4.2',
    'model.10': 'neck.reduce_coarse',
    'model.13': 'neck.top_down_middle',
    'model.14': 'neck.reduce_middle',
    'model.17': 'neck.top_down_fine',
    'model.18': 'neck.downsample_fine',
    'model.20': 'neck.bottom_up_middle',
    'model.21': 'neck.downsample_middle',
    'model.23': 'neck.bottom_up_coarse',
    'model.24': 'bbox_head',
}
SPPF_LAYER = 'model.9'
HEAD_LAYER = 'model.24'
STRIDES = (8, 16, 32)
C3_CONVS = {'cv1': 'main_conv', 'cv2': 'short_conv', 'cv3': 'final_conv'}


def convert_yolov5(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename Ultralytics' tensors and check them.

    Args:
        tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

    Returns:
        Weights of a :class:`~mmzsq.models.yolov5.YOLOv5`; ``size`` is a key of :data:`SIZES`.

    Raises:
        UserError: If they are not the weights of a YOLOv5 v6.0 or later. The message lists tensors that are missing,
            unexpected or of the wrong shape.
    """
    state_dict = {_rename(name): tensor for name, tensor in tensors.items()}
    size, num_classes = _detect(state_dict)
    expected = expected_shapes(SIZES[size], num_classes)
    _scale_anchors(state_dict)
    check_tensors(state_dict, expected, f'YOLOv5-{size} of v6.0 or later')
    return ConvertedDetector('YOLOv5', size, num_classes, to_float32(state_dict))


def expected_shapes(size: Size, num_classes: int) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a YOLOv5, without allocating memory.

    Args:
        size: The size.
        num_classes: Number of classes.
    """
    with torch.device('meta'):
        return tensor_shapes(
            {
                'backbone': YOLOv5CSPDarknet(*size),
                'neck': YOLOv5PAFPN(*size),
                'bbox_head': YOLOv5Head(num_classes, size.widen_factor),
            }
        )


def _rename(name: str) -> str:
    """Convert one name. Unknown names are unchanged, so that :func:`check_tensors` reports them as unexpected."""
    match = re.fullmatch(r'(model\.\d+)\.(.+)', name)
    if match is None or match[1] not in LAYERS:
        return name
    layer, rest = match.groups()
    if layer == SPPF_LAYER:
        rest = re.sub(r'^cv(\d)\.', r'conv\1.', rest)
    elif layer == HEAD_LAYER:
        rest = re.sub(r'^m\.', 'convs.', rest)
    else:
        rest = re.sub(r'^m\.(\d+)\.cv(\d)\.', r'blocks.\1.conv\2.', rest)
        rest = re.sub(r'^cv\d(?=\.)', lambda conv: C3_CONVS.get(conv[0], conv[0]), rest)
    return f'{LAYERS[layer]}.{rest}'


def _detect(state_dict: Mapping[str, Tensor]) -> tuple[str, int]:
    """Derive the size and the number of classes from tensor shapes."""
    try:
        width = state_dict['backbone.stem.conv.weight'].shape[0]
        outputs = state_dict['bbox_head.convs.0.weight'].shape[0]
        # (levels, anchors of a level, 2)
        _, anchors, _ = state_dict['bbox_head.anchors'].shape
        num_classes = outputs // anchors - 5
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            'this is not a YOLOv5 detector of v6.0 or later: it lacks the stem, the head or the anchors of that model'
        ) from error
    check_num_classes(num_classes)
    depth = sum(
        re.fullmatch(r'backbone\.stage1\.1\.blocks\.\d+\.conv1\.conv\.weight', name) is not None for name in state_dict
    )
    stem_width, stage_depth = YOLOv5CSPDarknet.widths[0], YOLOv5CSPDarknet.depths[0]
    return find_size(SIZES, stem_width, stage_depth, width, depth, 'YOLOv5', 'bottlenecks'), num_classes


def _scale_anchors(state_dict: dict[str, Tensor]) -> None:
    """Convert anchors from cells to pixels and drop the copy in pixels that v6.0 stores."""
    anchors = state_dict['bbox_head.anchors']
    if len(anchors) != len(STRIDES):
        return
    pixels = anchors.float() * torch.tensor(STRIDES).view(-1, 1, 1)
    state_dict['bbox_head.anchors'] = pixels
    copy = state_dict.get('bbox_head.anchor_grid')
    if copy is not None and torch.equal(copy.float().flatten(), pixels.flatten()):
        del state_dict['bbox_head.anchor_grid']
