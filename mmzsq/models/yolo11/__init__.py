# SPDX-License-Identifier: Apache-2.0
"""YOLO11: backbone, neck, head, task-aligned label assignment and loss."""

from mmzsq.models.yolo11.attention import QuantSpatialAttention
from mmzsq.models.yolo11.backbone import YOLO11CSPDarknet
from mmzsq.models.yolo11.detector import YOLO11
from mmzsq.models.yolo11.head import YOLO11Head
from mmzsq.models.yolo11.neck import YOLO11PAFPN

__all__ = [
    'YOLO11',
    'QuantSpatialAttention',
    'YOLO11CSPDarknet',
    'YOLO11Head',
    'YOLO11PAFPN',
]
