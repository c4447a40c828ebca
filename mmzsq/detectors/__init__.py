# SPDX-License-Identifier: Apache-2.0
"""Detectors: teacher and student as one model, a detector as synthesis sees it, and families that MMDetection lacks."""

from mmzsq.compat import let_ssd_predict
from mmzsq.detectors.max_iou_assigner import MaxIoUAssigner
from mmzsq.detectors.one_stage import OneStageTask
from mmzsq.detectors.task import DetectionTask
from mmzsq.detectors.task_choice import detection_task
from mmzsq.detectors.two_stage import TwoStageTask
from mmzsq.detectors.window_attention import QuantWindowMSA
from mmzsq.detectors.yolo11 import YOLO11, YOLO11PAFPN, QuantSpatialAttention, YOLO11CSPDarknet, YOLO11Head
from mmzsq.detectors.yolov5 import YOLOv5, YOLOv5CSPDarknet, YOLOv5Head, YOLOv5PAFPN
from mmzsq.detectors.zero_shot_detector import ZeroShotDetector

__all__ = [
    'YOLO11',
    'DetectionTask',
    'MaxIoUAssigner',
    'OneStageTask',
    'QuantSpatialAttention',
    'QuantWindowMSA',
    'TwoStageTask',
    'YOLO11CSPDarknet',
    'YOLO11Head',
    'YOLO11PAFPN',
    'YOLOv5',
    'YOLOv5CSPDarknet',
    'YOLOv5Head',
    'YOLOv5PAFPN',
    'ZeroShotDetector',
    'detection_task',
]

let_ssd_predict()
