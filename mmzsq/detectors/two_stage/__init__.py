# SPDX-License-Identifier: Apache-2.0
"""Two-stage detectors (Faster and Mask R-CNN) as synthesis sees them, with a loss that a CUDA graph can hold."""

from mmzsq.detectors.two_stage.fit import reason_unfit
from mmzsq.detectors.two_stage.task import TwoStageSamples, TwoStageTask

__all__ = ['TwoStageSamples', 'TwoStageTask', 'reason_unfit']
