# SPDX-License-Identifier: Apache-2.0
"""Detection tasks: the interface between a detector and image synthesis.

A task computes the detection loss for given labels and predicts labels, both for images in [0, 1].
"""

from mmzsq.tasks import yolov3_label_prior  # noqa: F401  (registers the label prior of YOLOv3)
from mmzsq.tasks.build import build_detection_task
from mmzsq.tasks.detection_task import DetectionTask
from mmzsq.tasks.one_stage import OneStageTask
from mmzsq.tasks.two_stage import TwoStageTask

__all__ = ['DetectionTask', 'OneStageTask', 'TwoStageTask', 'build_detection_task']
