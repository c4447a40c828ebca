# SPDX-License-Identifier: Apache-2.0
"""The first stage: what each anchor is to learn, and the loss of an ``RPNHead`` for it.

Targets depend on anchors and labels alone, so MMDetection's own assigner makes them, image by image, once for a set of
labels. A step only draws which anchors count, as ``RandomSampler`` does, and the loss runs over all anchors with those
left out weighing 0: nothing but elementwise operations, with shapes that never change.
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
from mmzsq.tasks.two_stage.sampling import draw, elementwise_loss


class AnchorTargets(NamedTuple):
    """What the A anchors of all levels are to learn in each of N images.

    Attributes:
        anchors: xyxy in pixels, (A, 4).
        level: Which level an anchor is of, (A,), long.
        positive: Answers for a label, (N, A), bool.
        negative: Is background, (N, A), bool; an anchor that is neither is not learnt.
        deltas: Encoded label of positive anchors, else 0, (N, A, 4).
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
    """Assign labels to anchors as ``rpn_head`` does.

    Args:
        rpn_head: An ``RPNHead`` with its training configuration.
        map_sizes: Rows and columns of its maps.
        labels: One entry an image, on the device: ``bboxes`` (n, 4) xyxy in pixels.
        image_size: Height and width in pixels.
        coder: That of ``rpn_head``, on the device.
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
        # For the first stage every label is of one class.
        objects = InstanceData(bboxes=instances.bboxes, labels=torch.zeros_like(instances.labels))
        assigned[image, used] = rpn_head.assigner.assign(InstanceData(priors=anchors[used]), objects).gt_inds
        positive = assigned[image] > 0
        deltas[image, positive] = coder.encode(anchors[positive], instances.bboxes[assigned[image, positive] - 1])
    return AnchorTargets(anchors, level, assigned > 0, assigned == 0, deltas)


def rpn_loss(rpn_head: Any, logits: Tensor, deltas: Tensor, targets: AnchorTargets) -> Tensor:
    """``RPNHead.loss_by_feat`` for anchors drawn anew: the sum of its class and box terms, a scalar.

    Args:
        rpn_head: An ``RPNHead`` with its training configuration.
        logits: Objectness of every anchor, (N, A).
        deltas: Box offsets of every anchor, (N, A, 4).
        targets: What they are to be.
    """
    sampler, pos_weight = rpn_head.sampler, rpn_head.train_cfg['pos_weight']
    keys = torch.rand(logits.shape, device=logits.device)
    positive = draw(targets.positive, keys, int(sampler.num * sampler.pos_fraction))
    negative = draw(targets.negative, keys, sampler.num, sampler.num - positive.sum(1))
    # MMDetection counts at least one positive and one negative anchor an image.
    count = (positive.sum(1).clamp(min=1) + negative.sum(1).clamp(min=1)).sum()
    weights = positive * (pos_weight if pos_weight > 0 else 1.0) + negative
    errors = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction='none')
    loss_cls = rpn_head.loss_cls.loss_weight * (errors * weights).sum() / count
    errors = elementwise_loss(rpn_head.loss_bbox, deltas, targets.deltas)
    loss_bbox = rpn_head.loss_bbox.loss_weight * (errors * positive[..., None]).sum() / count
    return loss_cls + loss_bbox
