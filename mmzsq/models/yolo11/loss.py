# SPDX-License-Identifier: Apache-2.0
"""YOLO11's loss as a function of raw outputs and padded targets.

Every term is a sum over places, divided by the sum of the scores to be learnt (upstream multiplies by the batch size;
here that is the caller's weight). Nothing waits for the device, and every shape is known from the arguments' shapes.
"""

from __future__ import annotations

import torch
from mmdet.models.losses.gfocal_loss import distribution_focal_loss
from mmdet.structures.bbox import bbox2distance
from torch import Tensor
from torch.nn import functional as F

from mmzsq.boxes import complete_iou
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolo11.assignment import assign_targets
from mmzsq.models.yolo11.decode import RawOutputs, decode_bboxes

MARGIN = 0.01
"""Cells by which a distance to learn stays below the greatest that can be predicted."""


def yolo11_loss(
    outputs: RawOutputs, targets: PaddedTargets, topk: int, alpha: float, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of the loss.

    Args:
        outputs: Raw outputs of all places.
        targets: The targets of the batch.
        topk: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.
        alpha: Likewise.
        beta: Likewise.

    Returns:
        Box (1 - CIoU), class (binary cross-entropy) and distance (distribution focal loss) terms, scalars in float32.
    """
    if targets.labels.shape[1] == 0:
        targets = _padding_alone(targets)
    bboxes = decode_bboxes(outputs)
    target, score = assign_targets(bboxes, outputs.classes.sigmoid(), outputs.points, targets, topk, alpha, beta)
    total = score.sum().clamp(min=1)
    image = torch.arange(len(target), device=target.device)[:, None]
    gt_bboxes, gt_labels = targets.bboxes.float()[image, target], targets.labels[image, target]

    classes = torch.arange(outputs.classes.shape[-1], device=target.device)
    wanted = (gt_labels[..., None] == classes) * score[..., None]
    loss_cls = F.binary_cross_entropy_with_logits(outputs.classes, wanted, reduction='sum')

    loss_bbox = ((1 - complete_iou(bboxes, gt_bboxes)) * score).sum()

    longest = outputs.distances.shape[-1] - 1
    cells = bbox2distance(outputs.points / outputs.strides, gt_bboxes / outputs.strides, longest, MARGIN)
    errors = distribution_focal_loss(outputs.distances.flatten(0, 2), cells.flatten(), reduction='none')
    loss_dfl = (errors.view_as(cells).mean(-1) * score).sum()
    return loss_bbox / total, loss_cls / total, loss_dfl / total


def _padding_alone(targets: PaddedTargets) -> PaddedTargets:
    """Give each image one target that is none: there is no maximum over nothing."""
    return PaddedTargets(*(tensor.new_zeros((len(tensor), 1, *tensor.shape[2:])) for tensor in targets))
