# SPDX-License-Identifier: Apache-2.0
"""Which view of a detector synthesis takes: a batched loss where one stands for the detector's own."""

from __future__ import annotations

from torch import nn

from mmzsq.tasks import one_stage, two_stage
from mmzsq.tasks.detection_task import DetectionTask, semantic_criterion
from mmzsq.tasks.padded_task import PaddedTargetsTask, takes_padded_targets


def detection_task(detector: nn.Module) -> DetectionTask:
    """Wrap a trained detector for synthesis; decided by what its parts are.

    Args:
        detector: Set to eval mode and frozen.

    Returns:
        A :class:`~mmzsq.tasks.two_stage.TwoStageTask`, :class:`~mmzsq.tasks.one_stage.OneStageTask` or
        :class:`~mmzsq.tasks.padded_task.PaddedTargetsTask` for what they fit, else a :class:`DetectionTask`, whose
        ``note`` says why.
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
        f'no batched detection loss for this {type(detector).__name__}, since {reason}: MMDetection computes it image '
        'by image, and synthesis takes several times longer'
    )
    if semantic_criterion(detector) is not None:
        task.note += '. Its semantic branch adds nothing to the loss: no pixel has a label for it'
    return task
