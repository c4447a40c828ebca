# SPDX-License-Identifier: Apache-2.0
"""Assign and sample the boxes that the second stage is trained on, for a whole batch at once.

The procedure is that of MMDetection's ``StandardRoIHead``. The candidates are the current proposals and the labels.
They are assigned by IoU as in ``MaxIoUAssigner`` and sampled as in ``RandomSampler``. All output shapes follow from the
argument shapes: if there are too few candidates, filler boxes that are neither positive nor negative take their place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from mmzsq.boxes import DeltaCoder, box_area, cluster_nms, pairwise_iou
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks.two_stage.anchors import AnchorTargets
from mmzsq.tasks.two_stage.sampling import random_subset


class RoIs(NamedTuple):
    """R boxes in each of N images, in random order, positive boxes first.

    Attributes:
        bboxes: Boxes in xyxy pixels, (N, R, 4).
        label: Index of the matched label, (N, R), long; 0 for boxes that are not positive.
        positive: Whether a box is matched to a label, (N, R), bool.
        negative: Whether a box is background, (N, R), bool. Boxes that are neither are ignored.
    """

    bboxes: Tensor
    label: Tensor
    positive: Tensor
    negative: Tensor

    def truncate(self, count: int) -> RoIs:
        """Return the first ``count`` boxes of each image."""
        return RoIs(*(field[:, :count] for field in self))


class Proposals(NamedTuple):
    """K proposals in each of N images, in order of descending objectness.

    Attributes:
        bboxes: Boxes in xyxy pixels, (N, K, 4).
        kept: Whether a proposal survived NMS, (N, K), bool.
    """

    bboxes: Tensor
    kept: Tensor


def generate_proposals(
    logits: Tensor,
    deltas: Tensor,
    anchors: AnchorTargets,
    coder: DeltaCoder,
    image_size: tuple[int, int],
    count: int,
    iou_thr: float,
) -> Proposals:
    """Decode the ``count`` most confident boxes of the first stage and apply NMS within each level.

    Args:
        logits: Objectness logit of every anchor, (N, A).
        deltas: Box offsets of every anchor, (N, A, 4).
        anchors: Anchors and their levels.
        coder: Box coder of the first stage.
        image_size: Height and width in pixels.
        count: Number of boxes before NMS.
        iou_thr: IoU above which the less confident box is dropped.
    """
    best = logits.topk(min(count, logits.shape[1])).indices
    image = torch.arange(len(logits), device=logits.device)[:, None]
    bboxes = coder.decode(anchors.anchors[best], deltas[image, best], image_size)
    # If images become NaN, the loss must report it. An index computed from NaN would crash the process instead.
    bboxes = bboxes.nan_to_num()
    return Proposals(bboxes, cluster_nms(bboxes, anchors.level[best], box_area(bboxes) > 0, iou_thr))


def jitter_boxes(bboxes: Tensor, copies: int, amount: float, image_size: tuple[int, int]) -> Tensor:
    """Copy boxes with every side moved by a random fraction of the box size, clipped to the image.

    Args:
        bboxes: Boxes in xyxy pixels, (N, M, 4).
        copies: Number of copies of each box.
        amount: Maximum move of a side, as a fraction of width or height.
        image_size: Height and width in pixels.

    Returns:
        Shape (N, M, copies, 4).
    """
    sides = (bboxes[..., 2:] - bboxes[..., :2]).repeat(1, 1, 2)[:, :, None]
    moves = torch.rand(*bboxes.shape[:2], copies, 4, device=bboxes.device) * 2 - 1
    return clip_boxes_to_image(bboxes[:, :, None] + amount * moves * sides, image_size)


def assign_by_iou(overlaps: Tensor, assigner: Any) -> Tensor:
    """Assign labels to boxes with the rules of ``MaxIoUAssigner``, for a whole batch.

    Args:
        overlaps: IoU of P boxes with M labels, (N, P, M). Negative values exclude a pair.
        assigner: A ``MaxIoUAssigner``, which defines the thresholds.

    Returns:
        Shape (N, P), long: 1 + index of the matched label, 0 for background, -1 for boxes to ignore.
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


def sample_rois(
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
    """Sample boxes to train on from proposals, labels and jittered labels.

    Args:
        proposals: Proposals of the first stage.
        targets: The padded labels.
        assigner: A ``MaxIoUAssigner``.
        image_size: Height and width in pixels.
        filler: Box in xyxy pixels, (4,), that takes the place of missing candidates. It should be large: if many points
            fall in few cells, the backward of RoIAlign is slow.
        count: Number of boxes per image R; fewer if there are fewer candidates.
        pos_fraction: Maximum fraction of positive boxes.
        jittered: Number of jittered copies of each label. Copies whose IoU with their label is below the assigner's
            ``pos_iou_thr`` are ignored.
        jitter_amount: See :func:`jitter_boxes`.
    """
    valid = targets.valid[:, None, :] & proposals.kept[:, :, None]
    overlaps = pairwise_iou(proposals.bboxes, targets.bboxes).masked_fill(~valid, -1.0)
    assigned = assign_by_iou(overlaps, assigner).masked_fill(~proposals.kept, -1)

    number = torch.arange(1, targets.labels.shape[1] + 1, device=targets.labels.device)
    own = torch.where(targets.valid, number, -1)
    copies = jitter_boxes(targets.bboxes, jittered, jitter_amount, image_size)
    close = pairwise_iou(copies, targets.bboxes[:, :, None]).squeeze(-1) >= assigner.pos_iou_thr
    own_copies = torch.where(close, own[:, :, None], -1)

    bboxes = torch.cat((targets.bboxes, copies.flatten(1, 2), proposals.bboxes), dim=1)
    return _sample(bboxes, torch.cat((own, own_copies.flatten(1), assigned), dim=1), count, pos_fraction, filler)


def _sample(bboxes: Tensor, assigned: Tensor, count: int, pos_fraction: float, filler: Tensor) -> RoIs:
    """Sample from candidates (N, C, 4) as ``RandomSampler`` does; ``assigned`` is that of :func:`assign_by_iou`."""
    keys = torch.rand(assigned.shape, device=assigned.device)
    positive = random_subset(assigned > 0, keys, int(count * pos_fraction))
    negative = random_subset(assigned == 0, keys, count, count - positive.sum(1))
    chosen = (2 * positive + negative + 0.5 * keys).topk(min(count, bboxes.shape[1])).indices
    image = torch.arange(len(bboxes), device=bboxes.device)[:, None]
    positive, negative = positive[image, chosen], negative[image, chosen]
    used = (positive | negative)[..., None]
    label = (assigned[image, chosen] - 1).clamp(min=0)
    return RoIs(torch.where(used, bboxes[image, chosen], filler), label, positive, negative)
