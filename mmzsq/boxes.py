# SPDX-License-Identifier: Apache-2.0
"""Boxes: IoU and its variants, encoding relative to anchors, and non-maximum suppression of a batch.

MMDetection's own functions compute the same, but copy small constants from the host at every call, loop over images, or
have shapes that depend on values; none of that can be part of a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Bound of a decoded box's log width and height relative to its anchor's; MMDetection's ``wh_ratio_clip``."""


def pairwise_iou(bboxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of every box with every other.

    Args:
        bboxes: Boxes, xyxy, (..., P, 4), any unit.
        others: In the same unit, (..., M, 4).

    Returns:
        Shape (..., P, M), in [0, 1]; 0 between boxes of no area.

    Example:
        >>> pairwise_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
        tensor([[0.5000]])
    """
    low = torch.maximum(bboxes[..., :, None, :2], others[..., None, :, :2])
    high = torch.minimum(bboxes[..., :, None, 2:], others[..., None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    overlap = width * height
    union = area(bboxes)[..., :, None] + area(others)[..., None, :] - overlap
    return overlap / union.clamp(min=1e-6)


def area(bboxes: Tensor) -> Tensor:
    """Areas (...) of boxes (..., 4), xyxy."""
    return (bboxes[..., 2] - bboxes[..., 0]) * (bboxes[..., 3] - bboxes[..., 1])


def paired_iou(bboxes: Tensor, targets: Tensor) -> Tensor:
    """IoU (...) of paired boxes, xyxy, (..., 4); 0 for boxes of no area."""
    overlap, union = overlap_and_union(bboxes, targets)
    return overlap / union.clamp(min=1e-6)


def overlap_and_union(bboxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (...) of intersection and union of paired boxes (..., 4), xyxy."""
    low = torch.maximum(bboxes[..., :2], targets[..., :2])
    high = torch.minimum(bboxes[..., 2:], targets[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    overlap = width * height
    return overlap, area(bboxes) + area(targets) - overlap


def complete_iou(bboxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the IoU less penalties for distant centers and unlike aspect ratios, pair by pair.

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
    # Both squared distances carry the factor 4 of doubled centers, which saves halving them.
    distance = (left1 + right1 - left2 - right2) ** 2 + (top1 + bottom1 - top2 - bottom2) ** 2
    diagonal = 4 * (hull_width**2 + hull_height**2)

    angle = torch.atan(width2 / (height2 + eps)) - torch.atan(width1 / (height1 + eps))
    unlike = 4 / math.pi**2 * angle**2
    # Equal boxes make this 0 / 0, hence the clamp.
    trade_off = (unlike / (1 - iou + unlike).clamp(min=eps)).detach()
    return iou - distance / (diagonal + eps) - trade_off * unlike


class DeltaCoder(NamedTuple):
    """Boxes as normalized offsets from other boxes: ``DeltaXYWHBBoxCoder`` with its constants on the device.

    Attributes:
        means: Of the offsets x, y, log width, log height; (4,).
        stds: Likewise.
        clip_border: Whether decoded boxes end at the edge of the image.
    """

    means: Tensor
    stds: Tensor
    clip_border: bool

    @classmethod
    def of(cls, coder: Any, device: torch.device) -> DeltaCoder:
        """Take over the constants of MMDetection's ``coder``."""
        return cls(torch.tensor(coder.means, device=device), torch.tensor(coder.stds, device=device), coder.clip_border)

    def encode(self, bboxes: Tensor, targets: Tensor) -> Tensor:
        """Offsets (..., 4) that lead from ``bboxes`` to ``targets``, both xyxy (..., 4) and of positive area."""
        center, side = _center_and_side(bboxes)
        target_center, target_side = _center_and_side(targets)
        offsets = torch.cat(((target_center - center) / side, (target_side / side).log()), dim=-1)
        return (offsets - self.means) / self.stds

    def decode(self, bboxes: Tensor, deltas: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Boxes (..., 4), xyxy in pixels, to which offsets ``deltas`` lead from ``bboxes``, both (..., 4).

        Args:
            bboxes: xyxy in pixels.
            deltas: As a head predicts them.
            image_size: Height and width in pixels, to clip to; None: boxes are not clipped.
        """
        center, side = _center_and_side(bboxes)
        offsets = deltas * self.stds + self.means
        center = center + offsets[..., :2] * side
        half = 0.5 * side * offsets[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        decoded = torch.cat((center - half, center + half), dim=-1)
        return decoded if image_size is None or not self.clip_border else clip_boxes_to_image(decoded, image_size)


def select_category(values: Tensor, labels: Tensor) -> Tensor:
    """Pick, of the answers to each RoI, that for its category.

    Args:
        values: (R, C, ...), or (R, 1, ...) of a class-agnostic head.
        labels: (R,).

    Returns:
        Shape (R, ...).
    """
    if values.shape[1] == 1:
        return values[:, 0]
    # Advanced indexing: its backward adds up in a fixed order, where torch.gather's does not.
    return values[torch.arange(len(labels), device=labels.device), labels]


def suppress(bboxes: Tensor, groups: Tensor, eligible: Tensor, iou_thr: float, rounds: int = 8) -> Tensor:
    """Greedy non-maximum suppression of a batch by a fixed number of rounds (Cluster-NMS, arXiv:2005.03572, alg. 1).

    A round lets every box that the round before kept suppress those below it. After as many rounds as boxes hang on one
    another in a chain the result is that of the greedy algorithm; chains are short, and where one is longer than
    ``rounds`` a box near its end may be wrongly kept or dropped.

    Args:
        bboxes: Best first, xyxy, (N, K, 4).
        groups: A box only suppresses those of its group, (N, K).
        eligible: Boxes that take part, (N, K), bool.
        iou_thr: A box that overlaps a better one by more than this is dropped.
        rounds: How many.

    Returns:
        Which boxes are kept, (N, K), bool.
    """
    overlapping = (pairwise_iou(bboxes, bboxes) > iou_thr) & (groups[:, :, None] == groups[:, None, :])
    suppresses = (overlapping & eligible[:, :, None]).triu(1)
    kept = eligible
    for _ in range(rounds):
        kept = eligible & ~(suppresses & kept[:, :, None]).any(1)
    return kept


def _center_and_side(bboxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = bboxes[..., :2], bboxes[..., 2:]
    return 0.5 * (low + high), high - low
