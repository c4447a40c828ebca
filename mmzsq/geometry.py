# SPDX-License-Identifier: Apache-2.0
"""Complete IoU of paired boxes (Zheng et al. 2020, arXiv:1911.08287, equations 10 and 11)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def complete_iou(bboxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the IoU less penalties for distant centres and unlike aspect ratios, pair by pair.

    Finite, and with a finite gradient, for equal boxes and for boxes of no area.

    Args:
        bboxes: Boxes, xyxy, shape (..., 4), any unit.
        targets: The boxes to compare with, in the same unit, broadcastable to ``bboxes``.
        eps: Added to, or the least value of, every denominator.

    Returns:
        Shape (...), in (-2, 1].
    """
    left1, top1, right1, bottom1 = bboxes.unbind(-1)
    left2, top2, right2, bottom2 = targets.unbind(-1)
    width1, height1, width2, height2 = (
        right1 - left1,
        bottom1 - top1,
        right2 - left2,
        bottom2 - top2,
    )

    overlap_width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    overlap_height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    overlap = overlap_width * overlap_height
    iou = overlap / (width1 * height1 + width2 * height2 - overlap + eps)

    hull_width = torch.maximum(right1, right2) - torch.minimum(left1, left2)
    hull_height = torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)
    # Both squared distances carry the factor 4 of doubled centres, which saves halving them.
    distance = (left1 + right1 - left2 - right2) ** 2 + (top1 + bottom1 - top2 - bottom2) ** 2
    diagonal = 4 * (hull_width**2 + hull_height**2)

    angle = torch.atan(width2 / (height2 + eps)) - torch.atan(width1 / (height1 + eps))
    unlike = 4 / math.pi**2 * angle**2
    # Equal boxes make this 0 / 0, hence the clamp.
    trade_off = (unlike / (1 - iou + unlike).clamp(min=eps)).detach()
    return iou - distance / (diagonal + eps) - trade_off * unlike
