# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 v6.0 and later: backbone, neck, head and loss."""

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.models.yolov5.backbone import YOLOv5CSPDarknet
from mmzsq.models.yolov5.detector import YOLOv5
from mmzsq.models.yolov5.head import YOLOv5Head
from mmzsq.models.yolov5.neck import YOLOv5PAFPN

__all__ = [
    'PaddedTargets',
    'YOLOv5',
    'YOLOv5CSPDarknet',
    'YOLOv5Head',
    'YOLOv5PAFPN',
    'pad_targets',
]
