# SPDX-License-Identifier: Apache-2.0
"""Convert a detector of Ultralytics of any supported family."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.yolo11 import YOLO11_FAMILY
from mmzsq.converters.yolo26 import YOLO26_FAMILY
from mmzsq.converters.yolov5 import convert_yolov5
from mmzsq.converters.yolov8 import YOLOV8_FAMILY

FAMILIES = (YOLOV8_FAMILY, YOLO11_FAMILY, YOLO26_FAMILY)
"""Families that their tensors identify. All other tensors are taken for those of a YOLOv5."""


def convert_detector(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename the tensors of a YOLOv5, YOLOv8, YOLO11 or YOLO26 and check them.

    Args:
        tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

    Raises:
        UserError: If they are not the weights of such a detector.
    """
    family = next((family for family in FAMILIES if family.matches(tensors)), None)
    return convert_yolov5(tensors) if family is None else family.convert(tensors)
