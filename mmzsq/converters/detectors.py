# SPDX-License-Identifier: Apache-2.0
"""Convert a detector of Ultralytics of any supported family."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.yolo11 import YOLO11_FAMILY
from mmzsq.converters.yolo26 import YOLO26_FAMILY
from mmzsq.converters.yolov5 import convert_yolov5
from mmzsq.converters.yolov8 import YOLOV8_FAMILY
from mmzsq.errors import UserError

FAMILIES = (YOLOV8_FAMILY, YOLO11_FAMILY, YOLO26_FAMILY)
"""Families that their tensors identify, beside YOLOv5, which has anchors."""

OTHER_HEADS = (
    (r'model\.\d+\.proto\.', 'a segmentation model'),
    (r'model\.\d+\.cv4\.\d', 'a model of poses, rotated boxes or open vocabularies'),
    (r'model\.\d+\.linear\.', 'a classifier'),
    (r'model\.\d+\.decoder\.', 'an RT-DETR'),
)
"""Patterns of tensor names of models for other tasks."""


def convert_detector(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename the tensors of a YOLOv5, YOLOv8, YOLO11 or YOLO26 and check them.

    Args:
        tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

    Raises:
        UserError: If they are not the weights of such a detector.
    """
    head = next((name for pattern, name in OTHER_HEADS if any(re.match(pattern, tensor) for tensor in tensors)), None)
    if head is not None:
        raise UserError(f'these weights have the head of {head}, but only detectors of upright boxes are supported')
    family = next((family for family in FAMILIES if family.matches(tensors)), None)
    if family is not None:
        return family.convert(tensors)
    if not any(name.endswith('.anchors') for name in tensors):
        raise UserError('these are not the weights of a YOLOv8, YOLO11, YOLO26, or YOLOv5 with anchors')
    return convert_yolov5(tensors)
