# SPDX-License-Identifier: Apache-2.0
"""Detectors: teacher and student as one model, a detector as synthesis sees it, and families that MMDetection lacks."""

from mmzsq.detectors.task import DetectionTask
from mmzsq.detectors.yolov5 import YOLOv5, YOLOv5CSPDarknet, YOLOv5Head, YOLOv5PAFPN
from mmzsq.detectors.zero_shot_detector import ZeroShotDetector

__all__ = ['DetectionTask', 'YOLOv5', 'YOLOv5CSPDarknet', 'YOLOv5Head', 'YOLOv5PAFPN', 'ZeroShotDetector']
