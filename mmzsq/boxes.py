# SPDX-License-Identifier: Apache-2.0
"""Box arithmetic: IoU and its variants, encoding relative to anchors, and batched non-maximum suppression.

MMDetection's functions compute the same values, but they copy small constants from the host on every call, loop over
images, or return shapes that depend on values. A CUDA graph cannot contain any of these.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

MAX_LOG_RATIO = abs(math.log(16 / 1000))
"""Largest magnitude of a decoded box's log width or log height relative to its anchor (MMDetection's
``wh_ratio_clip``)."""


def pairwise_iou(bboxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (IoU) of all pairs of boxes from two sets.

    Args:
        bboxes: Boxes in xyxy format, (..., P, 4), in any unit.
        others: Boxes in the same unit, (..., M, 4).

    Returns:
        Shape (..., P, M), in [0, 1]; 0 for two boxes of zero area.

    Example:
        >>> pairwise_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
        tensor([[0.5000]])
    """
    low = torch.maximum(bboxes[..., :, None, :2], others[..., None, :, :2])
    high = torch.minimum(bboxes[..., :, None, 2:], others[..., None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    overlap = width * height
    union = box_area(bboxes)[..., :, None] + box_area(others)[..., None, :] - overlap
    return overlap / union.clamp(min=1e-6)


def box_area(bboxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4) in xyxy format.

    Example:
        >>> box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0]]))
        tensor([6., 1.])
    """
    return (bboxes[..., 2] - bboxes[..., 0]) * (bboxes[..., 3] - bboxes[..., 1])


def paired_iou(bboxes: Tensor, targets: Tensor) -> Tensor:
    """IoU of paired boxes.

    Args:
        bboxes: Boxes in xyxy format, (..., 4), in any unit.
        targets: Boxes in the same unit, (..., 4).

    Returns:
        Shape (...), in [0, 1]; 0 for two boxes of zero area.

    Example:
        >>> bboxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
        >>> paired_iou(bboxes, torch.tensor([[0.0, 0.0, 2.0, 4.0], [0.0, 0.0, 1.0, 1.0]]))
        tensor([0.5000, 0.0000])
    """
    overlap, union = overlap_and_union(bboxes, targets)
    return overlap / union.clamp(min=1e-6)


def overlap_and_union(bboxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas (...) of the intersection and the union of paired boxes (..., 4) in xyxy format."""
    low = torch.maximum(bboxes[..., :2], targets[..., :2])
    high = torch.minimum(bboxes[..., 2:], targets[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    overlap = width * height
    return overlap, box_area(bboxes) + box_area(targets) - overlap


def complete_iou(bboxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of paired boxes (Zheng et al. 2020, arXiv:1911.08287).

    CIoU is the IoU minus penalties for the distance between the centers and for the difference in aspect ratio. Value
    and gradient are finite for equal boxes and for boxes of zero area.

    The intersection is computed per coordinate. Through :func:`overlap_and_union` the values would be the same, but
    autograd would sum the gradient in another order, which changes its last bit.

    Args:
        bboxes: Boxes in xyxy format, (..., 4), in any unit.
        targets: Boxes in the same unit, broadcastable to ``bboxes``.
        eps: Added to every denominator or used as its minimum.

    Returns:
        Shape (...), in (-2, 1].

    Example:
        >>> box = torch.tensor([0.0, 0.0, 2.0, 2.0])
        >>> complete_iou(box, box), complete_iou(box, box + torch.tensor([1.0, 0.0, 1.0, 0.0]))
        (tensor(1.), tensor(0.2564))
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
    # Centers are doubled instead of halved sums, so both squared distances carry a factor of 4, which cancels.
    distance = (left1 + right1 - left2 - right2) ** 2 + (top1 + bottom1 - top2 - bottom2) ** 2
    diagonal = 4 * (hull_width**2 + hull_height**2)

    angle = torch.atan(width2 / (height2 + eps)) - torch.atan(width1 / (height1 + eps))
    unlike = 4 / math.pi**2 * angle**2
    # For equal boxes this would be 0 / 0, hence the clamp.
    trade_off = (unlike / (1 - iou + unlike).clamp(min=eps)).detach()
    return iou - distance / (diagonal + eps) - trade_off * unlike


class DeltaCoder(NamedTuple):
    """Encode boxes as normalized offsets from other boxes and decode them.

    This is ``DeltaXYWHBBoxCoder`` with its constants on the device.

    Attributes:
        means: Means of the offsets x, y, log width and log height; (4,).
        stds: Standard deviations of the same offsets; (4,).
        clip_border: Whether decoded boxes are clipped to the image.
    """

    means: Tensor
    stds: Tensor
    clip_border: bool

    @classmethod
    def from_mmdet(cls, coder: Any, device: torch.device) -> DeltaCoder:
        """Copy the constants of MMDetection's ``coder`` to ``device``."""
        return cls(torch.tensor(coder.means, device=device), torch.tensor(coder.stds, device=device), coder.clip_border)

    def encode(self, bboxes: Tensor, targets: Tensor) -> Tensor:
        """Return the offsets (..., 4) from ``bboxes`` to ``targets``.

        Args:
            bboxes: Boxes in xyxy format, (..., 4), of positive area.
            targets: Boxes in the same unit, (..., 4), of positive area.
        """
        center, side = _center_and_side(bboxes)
        target_center, target_side = _center_and_side(targets)
        offsets = torch.cat(((target_center - center) / side, (target_side / side).log()), dim=-1)
        return (offsets - self.means) / self.stds

    def decode(self, bboxes: Tensor, deltas: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Apply predicted offsets to boxes.

        Args:
            bboxes: Boxes in xyxy pixels, (..., 4).
            deltas: Offsets as a head predicts them, (..., 4).
            image_size: Height and width in pixels to clip to; None does not clip.

        Returns:
            The decoded boxes in xyxy pixels, (..., 4).
        """
        center, side = _center_and_side(bboxes)
        offsets = deltas * self.stds + self.means
        center = center + offsets[..., :2] * side
        half = 0.5 * side * offsets[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        decoded = torch.cat((center - half, center + half), dim=-1)
        return decoded if image_size is None or not self.clip_border else clip_boxes_to_image(decoded, image_size)


def select_category(values: Tensor, labels: Tensor) -> Tensor:
    """Select the prediction of each RoI for its own category.

    Args:
        values: Predictions for every category, (R, C, ...), or (R, 1, ...) from a class-agnostic head.
        labels: Category of each RoI, (R,).

    Returns:
        Shape (R, ...).

    Example:
        >>> select_category(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([1, 0]))
        tensor([0.2000, 0.3000])
    """
    if values.shape[1] == 1:
        return values[:, 0]
    # The backward of advanced indexing sums in a fixed order; that of torch.gather does not.
    return values[torch.arange(len(labels), device=labels.device), labels]


def cluster_nms(bboxes: Tensor, groups: Tensor, eligible: Tensor, iou_thr: float, rounds: int = 8) -> Tensor:
    """Greedy non-maximum suppression of a batch in a fixed number of rounds (Cluster-NMS, arXiv:2005.03572, alg. 1).

    In each round, every box kept by the previous round suppresses the lower-ranked boxes that overlap it. The result
    equals greedy NMS after as many rounds as the longest chain of boxes that suppress one another. Chains are short. If
    one is longer than ``rounds``, a box near its end may be wrongly kept or dropped.

    Args:
        bboxes: Boxes in xyxy format, (N, K, 4), sorted by descending score.
        groups: Group of each box, (N, K). A box suppresses only boxes of its own group.
        eligible: Boxes that take part, (N, K), bool.
        iou_thr: A box is dropped if its IoU with a better box exceeds this.
        rounds: Number of rounds.

    Returns:
        Mask of the boxes that are kept, (N, K), bool.

    Example:
        >>> bboxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 9.0, 9.0]]])
        >>> cluster_nms(bboxes, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), iou_thr=0.5)
        tensor([[ True, False,  True]])
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
