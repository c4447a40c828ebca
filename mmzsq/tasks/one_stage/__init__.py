# SPDX-License-Identifier: Apache-2.0
"""One-stage detectors of MMDetection as synthesis sees them, with losses that a CUDA graph can hold."""

from mmzsq.tasks.one_stage.support import unsupported_reason
from mmzsq.tasks.one_stage.task import OneStageSamples, OneStageTask

__all__ = ['OneStageSamples', 'OneStageTask', 'unsupported_reason']
