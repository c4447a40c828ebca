# SPDX-License-Identifier: Apache-2.0
"""YOLOv8: backbone, neck and head. Label assignment, loss and decoding are those of YOLO11."""

from mmzsq.models.yolov8.backbone import YOLOv8CSPDarknet
from mmzsq.models.yolov8.detector import YOLOv8
from mmzsq.models.yolov8.head import YOLOv8Head
from mmzsq.models.yolov8.neck import YOLOv8PAFPN

__all__ = [
    'YOLOv8',
    'YOLOv8CSPDarknet',
    'YOLOv8Head',
    'YOLOv8PAFPN',
]
