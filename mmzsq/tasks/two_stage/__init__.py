# SPDX-License-Identifier: Apache-2.0
"""Two-stage detectors (Faster and Mask R-CNN) as synthesis sees them, with a loss that a CUDA graph can hold."""

from mmzsq.tasks.two_stage.support import unsupported_reason
from mmzsq.tasks.two_stage.task import TwoStageSamples, TwoStageTask

__all__ = ['TwoStageSamples', 'TwoStageTask', 'unsupported_reason']
