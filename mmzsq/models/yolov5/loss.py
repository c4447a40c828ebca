# SPDX-License-Identifier: Apache-2.0
"""YOLOv5's loss as a function of raw maps and padded targets.

Every term is a mean over the batch (upstream multiplies the sum by the batch size; here that is the
caller's weight). Nothing waits for the device, every shape is known from the arguments' shapes, and
the result does not depend on the order of the targets: where two share a cell, the higher IoU is
the objectness to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmzsq.boxes import complete_iou
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolov5.assignment import find_candidates
from mmzsq.models.yolov5.decode import decode_bboxes


def yolov5_loss(
    maps: Sequence[Tensor],
    targets: PaddedTargets,
    anchors: Tensor,
    strides: Sequence[int],
    balance: Sequence[float],
    max_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of the loss, each summed over the scales.

    All scales go through one sequence of operators: on a GPU the loss of a small batch is bound by their number.

    Args:
        maps: Raw outputs of each of L scales, shape (N, A*(5+C), H, W).
        targets: The targets of the batch.
        anchors: Width and height in pixels, shape (L, A, 2).
        strides: Pixels between cells, for each scale.
        balance: Weight of the objectness term of each scale.
        max_ratio: See :func:`~mmzsq.models.yolov5.assignment.find_candidates`.

    Returns:
        Box (1 - CIoU), objectness and class terms, scalars in float32.
    """
    images, device = len(maps[0]), maps[0].device
    num_anchors = anchors.shape[1]
    sizes = [scale_map.shape[-2:] for scale_map in maps]
    cells = [num_anchors * height * width for height, width in sizes]
    first_cells = [sum(cells[:scale]) for scale in range(len(cells))]
    rows, columns, first_cell, stride = _numbers(
        (*(size[0] for size in sizes), *(size[1] for size in sizes), *first_cells, *strides), device
    ).unflatten(0, (4, -1))
    x, y, matched = find_candidates(targets, anchors, stride, rows, columns, max_ratio)
    selected = [
        _GatherOutputs.apply(scale_map, num_anchors, *place) for scale_map, *place in zip(maps, x, y, strict=True)
    ]
    chosen = torch.stack([outputs for _, outputs in selected])

    of_scale = (-1, 1, 1, 1, 1)
    bboxes = decode_bboxes(chosen[..., :4], x, y, anchors[:, None, None, :, None], stride.view(of_scale))
    iou = complete_iou(bboxes, targets.bboxes[:, :, None, None].float())
    weight = matched / matched.sum((1, 2, 3, 4), keepdim=True).clamp(min=1)
    loss_bbox = ((1 - iou) * weight).sum()

    classes = torch.arange(chosen.shape[-1] - 5, device=device)
    is_class = (targets.labels[:, :, None, None, None] == classes).float().expand_as(chosen[..., 5:])
    errors = F.binary_cross_entropy_with_logits(chosen[..., 5:], is_class, reduction='none')
    loss_cls = (errors.mean(-1) * weight).sum()

    anchor = torch.arange(num_anchors, device=device).view(-1, 1)
    cell = (anchor * rows.view(of_scale) + y) * columns.view(of_scale) + x + first_cell.view(of_scale)
    objectness = iou.new_zeros((images, sum(cells))).scatter_reduce(
        1, cell.movedim(0, 1).flatten(1), (iou.detach().clamp(min=0) * matched).movedim(0, 1).flatten(1), 'amax'
    )
    # The mean over the cells of a scale, times its weight.
    of_cell = torch.cat(
        [
            torch.full((count,), share / (images * count), device=device)
            for share, count in zip(balance, cells, strict=True)
        ]
    )
    loss_obj = F.binary_cross_entropy_with_logits(
        torch.cat([logits for logits, _ in selected], dim=1), objectness, of_cell, reduction='sum'
    )
    return loss_bbox, loss_obj, loss_cls


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor (n,), long, without the wait of a copy from the host."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class _GatherOutputs(torch.autograd.Function):
    """What the loss reads of one scale's map, and the gradient of the map made in its own layout, in one piece.

    By operators the gradient is three maps, nearly all zeros: of the objectness, of what was chosen, and their sum.

    Inputs: the map (N, A*(5+C), H, W); A; column and row of the cells of each target, long (N, M, 1, S).

    Outputs, float32: objectness logits (N, A*H*W); all outputs of the cells (N, M, A, S, 5+C).
    """

    @staticmethod
    def forward(ctx: Any, scale_map: Tensor, num_anchors: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        image = torch.arange(len(scale_map), device=x.device).view(-1, 1, 1, 1)
        anchor = torch.arange(num_anchors, device=x.device).view(1, 1, -1, 1)
        outputs = scale_map.unflatten(1, (num_anchors, -1))
        ctx.save_for_backward(image, anchor, x, y)
        ctx.shape, ctx.dtype = outputs.shape, scale_map.dtype
        ctx.channels_last = scale_map.stride(1) == 1
        return outputs[:, :, 4].float().flatten(1), outputs[image, anchor, :, y, x].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objectness: Tensor, grad_chosen: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the map."""
        image, anchor, x, y = ctx.saved_tensors
        images, anchors, outputs, rows, columns = ctx.shape
        grad_objectness = grad_objectness.view(images, anchors, rows, columns)
        # Advanced indexing adds up in a fixed order, where scatter_add does not.
        if ctx.channels_last:
            grad = grad_chosen.new_zeros((images, rows, columns, anchors, outputs), dtype=ctx.dtype)
            grad.index_put_((image, y, x, anchor), grad_chosen.to(ctx.dtype), accumulate=True)
            grad[..., 4] += grad_objectness.permute(0, 2, 3, 1)
            return grad.flatten(3).permute(0, 3, 1, 2), None, None, None
        grad = grad_chosen.new_zeros(ctx.shape, dtype=ctx.dtype)
        grad.permute(0, 1, 3, 4, 2).index_put_((image, anchor, y, x), grad_chosen.to(ctx.dtype), accumulate=True)
        grad[:, :, 4] += grad_objectness
        return grad.flatten(1, 2), None, None, None
