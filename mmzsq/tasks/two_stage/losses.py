# SPDX-License-Identifier: Apache-2.0
"""Losses of the second stage for R boxes in each of N images, as pure functions of outputs and targets.

For the same boxes, they equal ``BBoxHead.loss_and_target`` and ``FCNMaskHead.loss_and_target`` of MMDetection, but use
masks instead of selecting boxes. The N*R outputs are in the order of :class:`~mmzsq.tasks.two_stage.rois.RoIs`,
flattened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmzsq.boxes import DeltaCoder, select_category
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks.elementwise_losses import unweighted_l1_loss
from mmzsq.tasks.two_stage.roi_align import PyramidLayout, roi_align
from mmzsq.tasks.two_stage.rois import RoIs

MASK_SAMPLES = 4
"""Sampling points per bin and axis in a label's mask. MMDetection samples once per pixel, so its number varies."""


def bbox_loss(
    head: Any,
    logits: Tensor,
    deltas: Tensor,
    rois: RoIs,
    targets: PaddedTargets,
    coder: DeltaCoder,
    pos_weight: float,
) -> Tensor:
    """Weighted sum of the class and box terms of a ``BBoxHead``.

    Args:
        head: The head, which defines the losses.
        logits: Class logits, background last, (N*R, C + 1).
        deltas: Box offsets, (N*R, C * 4), or (N*R, 4) from a class-agnostic head.
        rois: The boxes.
        targets: The labels.
        coder: Box coder of ``head``.
        pos_weight: Weight of positive boxes in the class term; values <= 0 mean 1.

    Returns:
        A scalar.
    """
    image = torch.arange(len(rois.label), device=rois.label.device)[:, None]
    positive, counted = rois.positive.flatten(), (rois.positive | rois.negative).flatten()
    labels = targets.labels[image, rois.label].flatten()
    count = counted.sum().clamp(min=1)
    weights = positive * (pos_weight if pos_weight > 0 else 1.0) + rois.negative.flatten()
    classes = labels.masked_fill(~positive, head.num_classes)
    errors = F.cross_entropy(logits.float(), classes, reduction='none')
    loss_cls = head.loss_cls.loss_weight * (errors * weights).sum() / count

    goals = targets.bboxes[image, rois.label]
    # Boxes that are not positive are replaced by the label itself, whose offset is 0.
    starts = torch.where(rois.positive[..., None], rois.bboxes, goals)
    wanted = coder.encode(starts, goals).flatten(0, 1)
    errors = unweighted_l1_loss(head.loss_bbox, select_category(deltas.float().unflatten(1, (-1, 4)), labels), wanted)
    loss_bbox = head.loss_bbox.loss_weight * (errors * positive[:, None]).sum() / count
    return loss_cls + loss_bbox


def mask_loss(head: Any, logits: Tensor, rois: RoIs, targets: PaddedTargets, masks: Tensor) -> Tensor:
    """Weighted loss of an ``FCNMaskHead``.

    Args:
        head: The head, which defines the weight.
        logits: Mask logits, (N*R, C, h, w), or (N*R, 1, h, w) from a class-agnostic head.
        rois: The boxes.
        targets: The labels.
        masks: Masks of the labels, (N, M, H, W), uint8, 1 inside the object.

    Returns:
        A scalar; 0 if no box is positive.
    """
    image = torch.arange(len(rois.label), device=rois.label.device)[:, None]
    labels = targets.labels[image, rois.label].flatten()
    height, width = logits.shape[2:]
    wanted = mask_targets(masks, rois, (height, width))
    chosen = select_category(logits.float(), labels)
    errors = F.binary_cross_entropy_with_logits(chosen, wanted, reduction='none').flatten(1).mean(1)
    positive = rois.positive.flatten()
    return head.loss_mask.loss_weight * (errors * positive).sum() / positive.sum().clamp(min=1)


@torch.no_grad()
def mask_targets(masks: Tensor, rois: RoIs, output_size: tuple[int, int]) -> Tensor:
    """Crop the mask of its label to each box. A bin is 1 if the mask covers at least half of it.

    Args:
        masks: Masks of the labels, (N, M, H, W), uint8, 1 inside the object.
        rois: The boxes, which lie inside the image.
        output_size: Number of bins in y and in x.

    Returns:
        Shape (N*R, *output_size), float32, 0 or 1.
    """
    images, per_image, height, width = masks.shape
    first = torch.arange(images, device=masks.device)[:, None] * per_image
    one = torch.ones(1, device=masks.device)
    level = PyramidLayout(one, one.long() * height, one.long() * width, one.long() * 0)
    mask = (first + rois.label).flatten()
    bboxes = rois.bboxes.flatten(0, 1)
    rows = masks.reshape(-1, 1)
    covered = roi_align(rows, level, mask, torch.zeros_like(mask), bboxes, output_size, MASK_SAMPLES)
    return (covered.squeeze(1) >= 0.5).float()
