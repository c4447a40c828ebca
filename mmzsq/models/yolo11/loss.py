# SPDX-License-Identifier: Apache-2.0
"""Loss of YOLOv8, YOLO11 and YOLO26 as a function of raw outputs and padded targets.

Every term is a sum over locations divided by the sum of the target scores. The original implementation multiplies by
the batch size; here the caller's weight does this. The host never waits for the device, and all shapes follow from the
argument shapes.
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
from mmzsq.update_parts import mean_in_update, part_count

MARGIN = 0.01
"""Minimum difference in cells between a target distance and the largest distance that can be predicted."""


def yolo11_loss(
    outputs: RawOutputs,
    targets: PaddedTargets,
    topk: int,
    alpha: float,
    beta: float,
    final_topk: int | None = None,
    min_side: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of the loss.

    Args:
        outputs: Raw outputs of all locations.
        targets: Targets of the batch.
        topk: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.
        alpha: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.
        beta: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.
        final_topk: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.
        min_side: See :func:`~mmzsq.models.yolo11.assignment.assign_targets`.

    Returns:
        The box (1 - CIoU), class (binary cross-entropy) and distance terms: scalars in float32. The distance term is
        the distribution focal loss or, with a single bin, the mean absolute error as a fraction of the image's width
        and height.
    """
    if targets.labels.shape[1] == 0:
        targets = _padding_alone(targets)
    bboxes = decode_bboxes(outputs)
    target, score = assign_targets(
        bboxes, outputs.classes.sigmoid(), outputs.points, targets, topk, alpha, beta, final_topk, min_side
    )
    total = mean_in_update(score.sum()).clamp(min=1 / part_count(in_update=True))
    image = torch.arange(len(target), device=target.device)[:, None]
    gt_bboxes, gt_labels = targets.bboxes.float()[image, target], targets.labels[image, target]

    classes = torch.arange(outputs.classes.shape[-1], device=target.device)
    wanted = (gt_labels[..., None] == classes) * score[..., None]
    loss_cls = F.binary_cross_entropy_with_logits(outputs.classes, wanted, reduction='sum')

    loss_bbox = ((1 - complete_iou(bboxes, gt_bboxes)) * score).sum()

    loss_distance = (_distance_errors(outputs, gt_bboxes).mean(-1) * score).sum()
    return loss_bbox / total, loss_cls / total, loss_distance / total


def _distance_errors(outputs: RawOutputs, gt_bboxes: Tensor) -> Tensor:
    """Compare the four distances of each location with those of its target, (N, P, 4)."""
    longest = outputs.distances.shape[-1] - 1
    if longest == 0:
        distances = bbox2distance(outputs.points, gt_bboxes)
        # The last cell of the image ends at its border.
        width, height = (outputs.points + outputs.strides / 2).amax(0)
        size = torch.stack((width, height, width, height))
        return (outputs.distances[..., 0] * outputs.strides - distances).abs() / size
    cells = bbox2distance(outputs.points / outputs.strides, gt_bboxes / outputs.strides, longest, MARGIN)
    errors = distribution_focal_loss(outputs.distances.flatten(0, 2), cells.flatten(), reduction='none')
    return errors.view_as(cells)


def _padding_alone(targets: PaddedTargets) -> PaddedTargets:
    """Give each image one target of padding, because a maximum over no targets is undefined."""
    return PaddedTargets(*(tensor.new_zeros((len(tensor), 1, *tensor.shape[2:])) for tensor in targets))
