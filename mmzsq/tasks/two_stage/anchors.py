# SPDX-License-Identifier: Apache-2.0
"""Targets and loss of the first stage (``RPNHead``).

Targets depend only on anchors and labels. MMDetection's own assigner computes them, image by image, once per set of
labels. Each step only samples anchors as ``RandomSampler`` does. The loss then runs over all anchors, with weight 0 for
those that were not sampled, so that it consists of elementwise operations on fixed shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F

from mmzsq.boxes import DeltaCoder
from mmzsq.tasks.elementwise_losses import unweighted_l1_loss
from mmzsq.tasks.two_stage.sampling import random_subset


class AnchorTargets(NamedTuple):
    """Targets of the A anchors of all levels in each of N images.

    Attributes:
        anchors: Anchors in xyxy pixels, (A, 4).
        level: Index of the level of each anchor, (A,), long.
        positive: Whether an anchor is matched to a label, (N, A), bool.
        negative: Whether an anchor is background, (N, A), bool. Anchors that are neither are ignored.
        deltas: Encoded label of positive anchors, 0 for all others, (N, A, 4).
    """

    anchors: Tensor
    level: Tensor
    positive: Tensor
    negative: Tensor
    deltas: Tensor


@torch.no_grad()
def assign_anchors(
    rpn_head: Any,
    map_sizes: Sequence[tuple[int, int]],
    labels: Sequence[InstanceData],
    image_size: tuple[int, int],
    coder: DeltaCoder,
) -> AnchorTargets:
    """Assign labels to anchors with the assigner of ``rpn_head``.

    Args:
        rpn_head: An ``RPNHead`` with its training configuration.
        map_sizes: Rows and columns of its maps.
        labels: One entry per image, on the device, with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
        image_size: Height and width in pixels.
        coder: Box coder of ``rpn_head``, on the device.
    """
    device = coder.means.device
    by_level = rpn_head.prior_generator.grid_priors(map_sizes, device=device)
    level = torch.cat([torch.full((len(priors),), index, device=device) for index, priors in enumerate(by_level)])
    anchors = torch.cat(by_level)
    valid = torch.cat(rpn_head.prior_generator.valid_flags(map_sizes, image_size, device=device))
    used = anchor_inside_flags(anchors, valid, image_size, rpn_head.train_cfg['allowed_border'])
    assigned = torch.full((len(labels), len(anchors)), -1, device=device)
    deltas = torch.zeros(len(labels), len(anchors), 4, device=device)
    for image, instances in enumerate(labels):
        # The first stage has a single object class.
        objects = InstanceData(bboxes=instances.bboxes, labels=torch.zeros_like(instances.labels))
        assigned[image, used] = rpn_head.assigner.assign(InstanceData(priors=anchors[used]), objects).gt_inds
        positive = assigned[image] > 0
        deltas[image, positive] = coder.encode(anchors[positive], instances.bboxes[assigned[image, positive] - 1])
    return AnchorTargets(anchors, level, assigned > 0, assigned == 0, deltas)


def rpn_loss(rpn_head: Any, logits: Tensor, deltas: Tensor, targets: AnchorTargets) -> Tensor:
    """Sample anchors and compute ``RPNHead.loss_by_feat`` for them.

    Args:
        rpn_head: An ``RPNHead`` with its training configuration.
        logits: Objectness logit of every anchor, (N, A).
        deltas: Box offsets of every anchor, (N, A, 4).
        targets: Targets of the anchors.

    Returns:
        The sum of the class and box terms, a scalar.
    """
    sampler, pos_weight = rpn_head.sampler, rpn_head.train_cfg['pos_weight']
    keys = torch.rand(logits.shape, device=logits.device)
    positive = random_subset(targets.positive, keys, int(sampler.num * sampler.pos_fraction))
    negative = random_subset(targets.negative, keys, sampler.num, sampler.num - positive.sum(1))
    # MMDetection counts at least one positive and one negative anchor per image.
    count = (positive.sum(1).clamp(min=1) + negative.sum(1).clamp(min=1)).sum()
    weights = positive * (pos_weight if pos_weight > 0 else 1.0) + negative
    errors = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction='none')
    loss_cls = rpn_head.loss_cls.loss_weight * (errors * weights).sum() / count
    errors = unweighted_l1_loss(rpn_head.loss_bbox, deltas, targets.deltas)
    loss_bbox = rpn_head.loss_bbox.loss_weight * (errors * positive[..., None]).sum() / count
    return loss_cls + loss_bbox
