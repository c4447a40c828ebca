# SPDX-License-Identifier: Apache-2.0
"""The boxes that the second stage learns from, chosen for a whole batch at once.

The same procedure as MMDetection's ``StandardRoIHead``: proposals of the moment and the labels themselves, assigned by
overlap as ``MaxIoUAssigner`` does, of which some are drawn as ``RandomSampler`` does. Every shape is known from those
of the arguments: where there is too little to draw from, boxes fill the places that are marked as not learnt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from mmzsq.boxes import DeltaCoder, area, pairwise_iou, suppress
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks.two_stage.anchors import AnchorTargets
from mmzsq.tasks.two_stage.sampling import draw


class RoIs(NamedTuple):
    """R boxes of each of N images, in random order, those that answer for a label first.

    Attributes:
        bboxes: xyxy in pixels, (N, R, 4).
        label: Index of the label that a box answers for, (N, R), long; 0 where it does not.
        positive: Answers for a label, (N, R), bool.
        negative: Is background, (N, R), bool; a box that is neither is not learnt.
    """

    bboxes: Tensor
    label: Tensor
    positive: Tensor
    negative: Tensor

    def first(self, count: int) -> RoIs:
        """The first ``count`` boxes of each image."""
        return RoIs(*(field[:, :count] for field in self))


class Proposals(NamedTuple):
    """K proposals of each of N images, best first.

    Attributes:
        bboxes: xyxy in pixels, (N, K, 4).
        kept: Whether it survived suppression, (N, K), bool.
    """

    bboxes: Tensor
    kept: Tensor


def propose(
    logits: Tensor,
    deltas: Tensor,
    anchors: AnchorTargets,
    coder: DeltaCoder,
    image_size: tuple[int, int],
    count: int,
    iou_thr: float,
) -> Proposals:
    """What the first stage proposes: its ``count`` most confident boxes, suppressed within each level.

    Args:
        logits: Objectness of every anchor, (N, A).
        deltas: Box offsets of every anchor, (N, A, 4).
        anchors: Anchors and their levels.
        coder: That of the first stage.
        image_size: Height and width in pixels.
        count: Boxes before suppression.
        iou_thr: Overlap above which the less confident box is dropped.
    """
    best = logits.topk(min(count, logits.shape[1])).indices
    image = torch.arange(len(logits), device=logits.device)[:, None]
    bboxes = coder.decode(anchors.anchors[best], deltas[image, best], image_size)
    # Where the images have become NaN the loss is to say so: an index computed from NaN would end the process.
    bboxes = bboxes.nan_to_num()
    return Proposals(bboxes, suppress(bboxes, anchors.level[best], area(bboxes) > 0, iou_thr))


def jitter(bboxes: Tensor, copies: int, amount: float, image_size: tuple[int, int]) -> Tensor:
    """Move every side of every box by a random part of the box's size, inside the image.

    Args:
        bboxes: xyxy in pixels, (N, M, 4).
        copies: Boxes to make of each.
        amount: Most that a side moves, as a part of width or height.
        image_size: Height and width in pixels.

    Returns:
        Shape (N, M, copies, 4).
    """
    sides = (bboxes[..., 2:] - bboxes[..., :2]).repeat(1, 1, 2)[:, :, None]
    moves = torch.rand(*bboxes.shape[:2], copies, 4, device=bboxes.device) * 2 - 1
    return clip_boxes_to_image(bboxes[:, :, None] + amount * moves * sides, image_size)


def assign(overlaps: Tensor, assigner: Any) -> Tensor:
    """``MaxIoUAssigner`` for a batch.

    Args:
        overlaps: IoU of P boxes with M labels, (N, P, M), negative where either is to be left out.
        assigner: Its thresholds.

    Returns:
        Shape (N, P), long: 1 + the index of a label, 0 for background, -1 for neither.
    """
    best, label = overlaps.max(2)
    assigned = torch.where(best >= assigner.pos_iou_thr, label + 1, (best < assigner.neg_iou_thr).long() - 1)
    if assigner.match_low_quality:
        best_of_label = overlaps.amax(1, keepdim=True)
        is_best = (overlaps == best_of_label) & (best_of_label >= max(assigner.min_pos_iou, 0))
        number = torch.arange(1, overlaps.shape[2] + 1, device=overlaps.device)
        matched = (is_best * number).amax(2)
        assigned = torch.where(matched > 0, matched, assigned)
    return assigned


def choose_rois(
    proposals: Proposals,
    targets: PaddedTargets,
    assigner: Any,
    image_size: tuple[int, int],
    filler: Tensor,
    count: int,
    pos_fraction: float,
    jittered: int,
    jitter_amount: float,
) -> RoIs:
    """Choose boxes to learn from among proposals, labels and jittered labels.

    Args:
        proposals: Of the first stage.
        targets: The labels, padded.
        assigner: A ``MaxIoUAssigner``.
        image_size: Height and width in pixels.
        filler: The box that stands where there is nothing to learn, xyxy in pixels, (4,). A large one: many points in
            few cells would be slow to add up in the backward of RoIAlign.
        count: Boxes an image R, fewer if there are not as many candidates.
        pos_fraction: Most of them, as a part, that answer for a label.
        jittered: Jittered copies of each label; those that overlap it by less than the assigner's ``pos_iou_thr`` are
            left out.
        jitter_amount: See :func:`jitter`.
    """
    valid = targets.valid[:, None, :] & proposals.kept[:, :, None]
    overlaps = pairwise_iou(proposals.bboxes, targets.bboxes).masked_fill(~valid, -1.0)
    assigned = assign(overlaps, assigner).masked_fill(~proposals.kept, -1)

    number = torch.arange(1, targets.labels.shape[1] + 1, device=targets.labels.device)
    own = torch.where(targets.valid, number, -1)
    copies = jitter(targets.bboxes, jittered, jitter_amount, image_size)
    close = pairwise_iou(copies, targets.bboxes[:, :, None]).squeeze(-1) >= assigner.pos_iou_thr
    own_copies = torch.where(close, own[:, :, None], -1)

    bboxes = torch.cat((targets.bboxes, copies.flatten(1, 2), proposals.bboxes), dim=1)
    return _sample(bboxes, torch.cat((own, own_copies.flatten(1), assigned), dim=1), count, pos_fraction, filler)


def _sample(bboxes: Tensor, assigned: Tensor, count: int, pos_fraction: float, filler: Tensor) -> RoIs:
    """Draw from candidates (N, C, 4) assigned as :func:`assign` says, as ``RandomSampler`` does."""
    keys = torch.rand(assigned.shape, device=assigned.device)
    positive = draw(assigned > 0, keys, int(count * pos_fraction))
    negative = draw(assigned == 0, keys, count, count - positive.sum(1))
    chosen = (2 * positive + negative + 0.5 * keys).topk(min(count, bboxes.shape[1])).indices
    image = torch.arange(len(bboxes), device=bboxes.device)[:, None]
    positive, negative = positive[image, chosen], negative[image, chosen]
    learnt = (positive | negative)[..., None]
    label = (assigned[image, chosen] - 1).clamp(min=0)
    return RoIs(torch.where(learnt, bboxes[image, chosen], filler), label, positive, negative)
