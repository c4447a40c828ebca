# SPDX-License-Identifier: Apache-2.0
"""Detectors, and components of detectors, that MMDetection does not provide."""

from mmzsq.compat import patch_mmdet
from mmzsq.models.max_iou_assigner import SyncFreeMaxIoUAssigner
from mmzsq.models.torchvision_anchors import TorchvisionAnchorGenerator
from mmzsq.models.window_attention import QuantWindowMSA
from mmzsq.models.yolo11 import YOLO11, YOLO11PAFPN, QuantSpatialAttention, YOLO11CSPDarknet, YOLO11Head
from mmzsq.models.yolo26 import YOLO26, YOLO26PAFPN, YOLO26CSPDarknet, YOLO26Head
from mmzsq.models.yolov5 import YOLOv5, YOLOv5CSPDarknet, YOLOv5Head, YOLOv5PAFPN
from mmzsq.models.yolov8 import YOLOv8, YOLOv8CSPDarknet, YOLOv8Head, YOLOv8PAFPN

patch_mmdet()

__all__ = [
    'YOLO11',
    'SyncFreeMaxIoUAssigner',
    'QuantSpatialAttention',
    'QuantWindowMSA',
    'TorchvisionAnchorGenerator',
    'YOLO11CSPDarknet',
    'YOLO11Head',
    'YOLO11PAFPN',
    'YOLO26',
    'YOLO26CSPDarknet',
    'YOLO26Head',
    'YOLO26PAFPN',
    'YOLOv5',
    'YOLOv5CSPDarknet',
    'YOLOv5Head',
    'YOLOv5PAFPN',
    'YOLOv8',
    'YOLOv8CSPDarknet',
    'YOLOv8Head',
    'YOLOv8PAFPN',
]
