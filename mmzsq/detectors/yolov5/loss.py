# SPDX-License-Identifier: Apache-2.0
"""YOLOv5's loss as a function of raw maps and padded targets.

Every term is a mean over the batch (upstream multiplies the sum by the batch size; here that is the
caller's weight). Nothing waits for the device, every shape is known from the arguments' shapes, and
the result does not depend on the order of the targets: where two share a cell, the higher IoU is
the objectness to learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmzsq.detectors.targets import PaddedTargets
from mmzsq.detectors.yolov5.assignment import find_candidates
from mmzsq.detectors.yolov5.decode import decode_bboxes
from mmzsq.geometry import complete_iou


def yolov5_loss(
    maps: Sequence[Tensor],
    targets: PaddedTargets,
    anchors: Tensor,
    strides: Sequence[int],
    balance: Sequence[float],
    max_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of the loss, each summed over the scales.

    Args:
        maps: Raw outputs of each scale, shape (N, A*(5+C), H, W).
        targets: The targets of the batch.
        anchors: Width and height in pixels, shape (scales, A, 2).
        strides: Pixels between cells, for each scale.
        balance: Weight of the objectness term of each scale.
        max_ratio: See :func:`~mmzsq.detectors.yolov5.assignment.find_candidates`.

    Returns:
        Box (1 - CIoU), objectness and class terms, scalars in float32.
    """
    terms = [
        _scale_loss(scale_map, targets, scale_anchors, stride, weight, max_ratio)
        for scale_map, scale_anchors, stride, weight in zip(maps, anchors, strides, balance, strict=True)
    ]
    bbox, obj, cls = (torch.stack(term).sum() for term in zip(*terms, strict=True))
    return bbox, obj, cls


def _scale_loss(
    scale_map: Tensor,
    targets: PaddedTargets,
    anchors: Tensor,
    stride: int,
    balance: float,
    max_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the box, objectness and class terms of one scale."""
    images, _, rows, columns = scale_map.shape
    outputs = scale_map.unflatten(1, (len(anchors), -1))
    x, y, matched = find_candidates(targets, anchors, stride, (rows, columns), max_ratio)
    image = torch.arange(images, device=x.device).view(-1, 1, 1, 1)
    anchor = torch.arange(len(anchors), device=x.device).view(1, 1, -1, 1)
    # Advanced indexing: its backward adds up in a fixed order, where torch.gather's does not.
    chosen = outputs[image, anchor, :, y, x].float()

    bboxes = decode_bboxes(chosen[..., :4], x, y, anchors[:, None], stride)
    iou = complete_iou(bboxes, targets.bboxes[:, :, None, None].float())
    num_matched = matched.sum().clamp(min=1)
    loss_bbox = ((1 - iou) * matched).sum() / num_matched

    classes = torch.arange(chosen.shape[-1] - 5, device=x.device)
    is_class = (targets.labels[:, :, None, None, None] == classes).float().expand_as(chosen[..., 5:])
    errors = F.binary_cross_entropy_with_logits(chosen[..., 5:], is_class, reduction='none')
    loss_cls = (errors.mean(-1) * matched).sum() / num_matched

    cell = (anchor * rows + y) * columns + x
    objectness = iou.new_zeros((images, len(anchors) * rows * columns)).scatter_reduce(
        1, cell.flatten(1), (iou.detach().clamp(min=0) * matched).flatten(1), 'amax'
    )
    loss_obj = F.binary_cross_entropy_with_logits(outputs[:, :, 4].float().flatten(1), objectness)
    return loss_bbox, balance * loss_obj, loss_cls
