# SPDX-License-Identifier: Apache-2.0
"""Build the detection task of a detector, with a batched loss if one supports it."""

from __future__ import annotations

from torch import nn

from mmzsq.tasks import one_stage, two_stage
from mmzsq.tasks.detection_task import DetectionTask, semantic_criterion
from mmzsq.tasks.padded_task import PaddedTargetsTask, takes_padded_targets


def build_detection_task(detector: nn.Module) -> DetectionTask:
    """Wrap a trained detector for synthesis, using the fastest task that supports its components.

    Args:
        detector: A trained detector. It is set to eval mode and frozen.

    Returns:
        A :class:`~mmzsq.tasks.padded_task.PaddedTargetsTask`, :class:`~mmzsq.tasks.one_stage.OneStageTask` or
        :class:`~mmzsq.tasks.two_stage.TwoStageTask` if it supports the detector. Otherwise a :class:`DetectionTask`
        whose ``note`` gives the reason.
    """
    if takes_padded_targets(detector):
        return PaddedTargetsTask(detector)
    if getattr(detector, 'roi_head', None) is None:
        reason = one_stage.unsupported_reason(detector)
        if reason is None:
            return one_stage.OneStageTask(detector)
    else:
        reason = two_stage.unsupported_reason(detector)
        if reason is None:
            return two_stage.TwoStageTask(detector)
    task = DetectionTask(detector)
    task.note = (
        f'no batched detection loss for this {type(detector).__name__}, since {reason}. MMDetection computes its loss '
        'image by image, and synthesis takes several times longer'
    )
    if semantic_criterion(detector) is not None:
        task.note += '. Its semantic branch adds nothing to the loss, because no pixel has a semantic label'
    return task
