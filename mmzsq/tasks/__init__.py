# SPDX-License-Identifier: Apache-2.0
"""Detectors as synthesis sees them: losses for labels and predictions for images in [0, 1]."""

from mmzsq.tasks.build import detection_task
from mmzsq.tasks.detection_task import DetectionTask
from mmzsq.tasks.one_stage import OneStageTask
from mmzsq.tasks.two_stage import TwoStageTask

__all__ = ['DetectionTask', 'OneStageTask', 'TwoStageTask', 'detection_task']
