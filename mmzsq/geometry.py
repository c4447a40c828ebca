# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes as a differentiable function; shared by detection losses and distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-7


def complete_iou(bboxes1: Tensor, bboxes2: Tensor) -> Tensor:
    """Complete IoU of paired boxes: IoU less a penalty for distant centres and one for unlike shapes.

    The weight of the shape penalty, alpha = v / (1 - IoU + v), is 0/0 where both boxes are equal; its denominator is kept
    above zero, so that value and gradient are finite there.

    Args:
        bboxes1: Shape (..., 4), xyxy.
        bboxes2: The same shape.

    Returns:
        Shape (...), at most 1. Zheng et al. 2020, https://arxiv.org/abs/1911.08287, eq. 8-10.
    """
    x1, y1, x2, y2 = bboxes1.unbind(-1)
    u1, v1, u2, v2 = bboxes2.unbind(-1)
    width1, height1, width2, height2 = x2 - x1, y2 - y1, u2 - u1, v2 - v1
    overlap = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0) * (
        torch.minimum(y2, v2) - torch.maximum(y1, v1)
    ).clamp(min=0)
    iou = overlap / (width1 * height1 + width2 * height2 - overlap + EPS)
    hull_width = torch.maximum(x2, u2) - torch.minimum(x1, u1)
    hull_height = torch.maximum(y2, v2) - torch.minimum(y1, v1)
    diagonal = hull_width.square() + hull_height.square() + EPS
    distance = ((u1 + u2 - x1 - x2).square() + (v1 + v2 - y1 - y2).square()) / 4
    angle = torch.atan(width2 / (height2 + EPS)) - torch.atan(width1 / (height1 + EPS))
    shape = (4 / math.pi**2) * angle.square()
    with torch.no_grad():
        alpha = shape / (1 - iou + shape).clamp(min=EPS)
    return iou - distance / diagonal - alpha * shape
