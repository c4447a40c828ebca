# SPDX-License-Identifier: Apache-2.0
"""Detection task for MMDetection's one-stage detectors, with losses that can be captured in a CUDA graph."""

from mmzsq.tasks.one_stage.support import unsupported_reason
from mmzsq.tasks.one_stage.task import OneStageSamples, OneStageTask

__all__ = ['OneStageSamples', 'OneStageTask', 'unsupported_reason']
