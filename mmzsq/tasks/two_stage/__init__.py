# SPDX-License-Identifier: Apache-2.0
"""Detection task for Faster and Mask R-CNN, with a loss that can be captured in a CUDA graph."""

from mmzsq.tasks.two_stage.support import unsupported_reason
from mmzsq.tasks.two_stage.task import TwoStageSamples, TwoStageTask

__all__ = ['TwoStageSamples', 'TwoStageTask', 'unsupported_reason']
