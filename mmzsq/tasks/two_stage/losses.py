# SPDX-License-Identifier: Apache-2.0
"""Losses of the second stage for R boxes of each of N images: pure functions of outputs and targets.

Equal to ``BBoxHead.loss_and_target`` and ``FCNMaskHead.loss_and_target`` of MMDetection for the same boxes, with masks
in the place of selections. N*R boxes stand in the order of :class:`~mmzsq.tasks.two_stage.rois.RoIs`, flattened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmzsq.boxes import DeltaCoder, select_category
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks.two_stage.roi_align import Levels, roi_align
from mmzsq.tasks.two_stage.rois import RoIs
from mmzsq.tasks.two_stage.sampling import elementwise_loss

MASK_SAMPLES = 4
"""Points a bin and axis at which a label's mask is read. MMDetection takes one a pixel, a number that varies."""


def bbox_loss(
    head: Any,
    logits: Tensor,
    deltas: Tensor,
    rois: RoIs,
    targets: PaddedTargets,
    coder: DeltaCoder,
    pos_weight: float,
) -> Tensor:
    """Class and box terms of a ``BBoxHead``, each with its weight, summed: a scalar.

    Args:
        head: Tells the losses.
        logits: Classes, background last, (N*R, C + 1).
        deltas: (N*R, C * 4), or (N*R, 4) if the head predicts one box for all classes.
        rois: The boxes.
        targets: The labels.
        coder: That of ``head``.
        pos_weight: Weight of a box that answers for a label in the class term; 1 if not above 0.
    """
    image = torch.arange(len(rois.label), device=rois.label.device)[:, None]
    positive, learnt = rois.positive.flatten(), (rois.positive | rois.negative).flatten()
    labels = targets.labels[image, rois.label].flatten()
    count = learnt.sum().clamp(min=1)
    weights = positive * (pos_weight if pos_weight > 0 else 1.0) + rois.negative.flatten()
    classes = labels.masked_fill(~positive, head.num_classes)
    errors = F.cross_entropy(logits.float(), classes, reduction='none')
    loss_cls = head.loss_cls.loss_weight * (errors * weights).sum() / count

    goals = targets.bboxes[image, rois.label]
    # Where a box does not answer for a label it has no offset to it: that of the label to itself is 0.
    starts = torch.where(rois.positive[..., None], rois.bboxes, goals)
    wanted = coder.encode(starts, goals).flatten(0, 1)
    errors = elementwise_loss(head.loss_bbox, select_category(deltas.float().unflatten(1, (-1, 4)), labels), wanted)
    loss_bbox = head.loss_bbox.loss_weight * (errors * positive[:, None]).sum() / count
    return loss_cls + loss_bbox


def mask_loss(head: Any, logits: Tensor, rois: RoIs, targets: PaddedTargets, masks: Tensor) -> Tensor:
    """The weighted loss of an ``FCNMaskHead``: a scalar, 0 if no box answers for a label.

    Args:
        head: Tells the weight.
        logits: (N*R, C, h, w), or (N*R, 1, h, w) if the head predicts one mask for all classes.
        rois: The boxes.
        targets: The labels.
        masks: Theirs, (N, M, H, W), uint8, 1 inside.
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
    """What the mask of its label looks like inside each box: covered by at least half, bin by bin.

    Args:
        masks: Of the labels, (N, M, H, W), uint8, 1 inside.
        rois: The boxes, inside the image.
        output_size: Bins in y and in x.

    Returns:
        Shape (N*R, *output_size), float32, 0 or 1.
    """
    images, per_image, height, width = masks.shape
    first = torch.arange(images, device=masks.device)[:, None] * per_image
    one = torch.ones(1, device=masks.device)
    level = Levels(one, one.long() * height, one.long() * width, one.long() * 0)
    mask = (first + rois.label).flatten()
    bboxes = rois.bboxes.flatten(0, 1)
    rows = masks.reshape(-1, 1)
    covered = roi_align(rows, level, mask, torch.zeros_like(mask), bboxes, output_size, MASK_SAMPLES)
    return (covered.squeeze(1) >= 0.5).float()
