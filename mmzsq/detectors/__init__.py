# SPDX-License-Identifier: Apache-2.0
"""Detectors: teacher and student as one model, a detector as synthesis sees it, and families that MMDetection lacks."""

from mmzsq.detectors.task import DetectionTask
from mmzsq.detectors.task_choice import detection_task
from mmzsq.detectors.two_stage import TwoStageTask
from mmzsq.detectors.window_attention import QuantWindowMSA
from mmzsq.detectors.yolov5 import YOLOv5, YOLOv5CSPDarknet, YOLOv5Head, YOLOv5PAFPN
from mmzsq.detectors.zero_shot_detector import ZeroShotDetector

__all__ = [
    'DetectionTask',
    'QuantWindowMSA',
    'TwoStageTask',
    'YOLOv5',
    'YOLOv5CSPDarknet',
    'YOLOv5Head',
    'YOLOv5PAFPN',
    'ZeroShotDetector',
    'detection_task',
]
