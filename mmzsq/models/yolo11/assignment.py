# SPDX-License-Identifier: Apache-2.0
"""Which places of YOLO11 answer for which target: task-aligned assignment, for a whole batch at once.

Feng et al. 2021, arXiv:2108.07755, with the exponents and the rule for contested places that the released weights were
trained by. A place whose center lies inside a target is judged by its score for the target's class and by its box, and
the best answer for the target. All pairs of targets and places are kept, with masks, so that shapes depend on nothing
but the padded length and no step waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmzsq.boxes import complete_iou
from mmzsq.models.padded_targets import PaddedTargets

EPS = 1e-9


class Assignment(NamedTuple):
    """What each of P places answers for.

    Attributes:
        target: Index of the target, shape (N, P), long; 0 for background.
        score: What the score for the class of the target should be, in [0, 1], shape (N, P); 0 for background.
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
) -> Assignment:
    """Assign targets to places.

    A target is answered for by the ``topk`` places inside it of the greatest alignment, score^alpha * CIoU^beta. A
    place that would answer for several answers for the one that its box overlaps most. Its score is to be its
    alignment, scaled so that the greatest of a target is the greatest CIoU of that target.

    Args:
        bboxes: Predicted boxes, xyxy in pixels of the network's input, shape (N, P, 4).
        scores: Predicted scores of each class, in [0, 1], shape (N, P, C).
        points: Center of each place, x and y in the same pixels, shape (P, 2).
        targets: The targets of the batch, M an image, at least 1.
        topk: Most places of a target; of equal alignment, all.
        alpha: Exponent of the score.
        beta: Exponent of the CIoU.
    """
    images, length = targets.labels.shape
    gt_bboxes = targets.bboxes.float()[:, :, None]
    inside = ((points > gt_bboxes[..., :2]) & (points < gt_bboxes[..., 2:])).all(-1) & targets.valid[..., None]
    overlap = torch.where(inside, complete_iou(bboxes[:, None], gt_bboxes).clamp(min=0), 0)
    image = torch.arange(images, device=points.device)[:, None]
    alignment = scores[image, :, targets.labels] ** alpha * overlap**beta

    least = alignment.topk(min(topk, len(points))).values[..., -1:]
    answers = (alignment >= least) & (alignment > 0)
    contested = answers.sum(1, keepdim=True) > 1
    index = torch.arange(length, device=points.device)[:, None]
    answers = torch.where(contested, overlap.argmax(1, keepdim=True) == index, answers)

    alignment, overlap = alignment * answers, overlap * answers
    scale = overlap.amax(2, keepdim=True) / (alignment.amax(2, keepdim=True) + EPS)
    return Assignment(answers.int().argmax(1), (alignment * scale).amax(1))
