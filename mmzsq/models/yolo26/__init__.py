# SPDX-License-Identifier: Apache-2.0
"""YOLO26: backbone, neck and a head without NMS. Assignment, loss and decoding extend those of YOLO11."""

from mmzsq.models.yolo26.backbone import YOLO26CSPDarknet
from mmzsq.models.yolo26.detector import YOLO26
from mmzsq.models.yolo26.head import YOLO26Head
from mmzsq.models.yolo26.neck import YOLO26PAFPN

__all__ = [
    'YOLO26',
    'YOLO26CSPDarknet',
    'YOLO26Head',
    'YOLO26PAFPN',
]
