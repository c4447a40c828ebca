# SPDX-License-Identifier: Apache-2.0
"""Task-aligned label assignment of YOLOv8, YOLO11 and YOLO26 (TOOD, Feng et al. 2021, arXiv:2108.07755).

The exponents and the rule for contested locations are those with which the released weights were trained. Each location
whose center lies inside a target gets an alignment: a combination of its score for the target's class and the IoU of
its box. The best-aligned locations are assigned to the target; YOLO26 keeps a single one. The targets of a whole batch
are assigned at once. All pairs of targets and locations are kept, with masks, so that shapes depend only on the padded
length and the host never waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.boxes import complete_iou
from mmzsq.models.padded_targets import PaddedTargets

EPS = 1e-9


class Assignment(NamedTuple):
    """Assignment of P locations in each of N images.

    Attributes:
        target: Index of the assigned target, shape (N, P), long; 0 for background.
        score: Target score for the class of the assigned target, in [0, 1], shape (N, P); 0 for background.
    """

    target: Tensor
    score: Tensor


@torch.no_grad()
def assign_targets(
    bboxes: Tensor,
    scores: Tensor,
    points: Tensor,
    targets: PaddedTargets,
    topk: int,
    alpha: float,
    beta: float,
    final_topk: int | None = None,
    min_side: float = 0.0,
) -> Assignment:
    """Assign targets to locations.

    Each target is assigned to the ``topk`` locations inside it with the highest alignment, score^alpha * CIoU^beta. A
    location that qualifies for several targets gets the one that its box overlaps most. The target score is the
    alignment, rescaled such that its maximum over the locations of a target equals their maximum CIoU.

    With ``final_topk`` each target then keeps at most that many of its locations, those with the highest alignment.

    Args:
        bboxes: Predicted boxes in xyxy pixels of the network's input, shape (N, P, 4).
        scores: Predicted class scores in [0, 1], shape (N, P, C).
        points: Center x and y of each location in the same pixels, shape (P, 2).
        targets: Targets of the batch, padded to M >= 1 per image.
        topk: Maximum number of locations per target; ties in alignment are all included.
        alpha: Exponent of the score.
        beta: Exponent of the CIoU.
        final_topk: Maximum number of locations that a target keeps after contested locations are settled; None: all.
        min_side: A location is inside a target if it is inside the box whose sides are enlarged to this length, in
            pixels, about the center of the target.
    """
    images, length = targets.labels.shape
    gt_bboxes = targets.bboxes.float()[:, :, None]
    low, high = gt_bboxes[..., :2], gt_bboxes[..., 2:]
    if min_side:
        center, half = (low + high) / 2, (high - low).clamp(min=min_side) / 2
        # Larger sides keep their exact coordinates.
        small = high - low < min_side
        low, high = torch.where(small, center - half, low), torch.where(small, center + half, high)
    inside = ((points > low) & (points < high)).all(-1) & targets.valid[..., None]
    overlap = torch.where(inside, complete_iou(bboxes[:, None], gt_bboxes).clamp(min=0), 0)
    image = torch.arange(images, device=points.device)[:, None]
    alignment = scores[image, :, targets.labels] ** alpha * overlap**beta

    least = alignment.topk(min(topk, len(points))).values[..., -1:]
    assigned = (alignment >= least) & (alignment > 0)
    contested = assigned.sum(1, keepdim=True) > 1
    index = torch.arange(length, device=points.device)[:, None]
    assigned = torch.where(contested, overlap.argmax(1, keepdim=True) == index, assigned)

    if final_topk is not None:
        best = (alignment * assigned).topk(min(final_topk, len(points))).indices
        assigned = assigned & torch.zeros_like(assigned).scatter(2, best, True)

    alignment, overlap = alignment * assigned, overlap * assigned
    scale = overlap.amax(2, keepdim=True) / (alignment.amax(2, keepdim=True) + EPS)
    return Assignment(assigned.int().argmax(1), (alignment * scale).amax(1))
