# SPDX-License-Identifier: Apache-2.0
"""Loss of YOLOv5 as a function of raw maps and padded targets.

All terms are averaged over the batch. The original implementation multiplies their sum by the batch size; here the
caller's weight does this. The host never waits for the device, and all shapes follow from the argument shapes. The
result does not depend on the order of the targets: if two targets share a cell and anchor, the objectness target is the
higher IoU.
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
from mmzsq.update_parts import mean_in_update, part_count, row_shares


def yolov5_loss(
    maps: Sequence[Tensor],
    targets: PaddedTargets,
    anchors: Tensor,
    strides: Sequence[int],
    balance: Sequence[float],
    max_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the terms of the loss, each summed over the scales.

    All scales share one sequence of operators, because for small batches the time on a GPU depends on their number.

    Args:
        maps: Raw outputs of each of L scales, shape (N, A*(5+C), H, W).
        targets: Targets of the batch.
        anchors: Width and height of the anchors in pixels, shape (L, A, 2).
        strides: Stride of each scale in pixels.
        balance: Weight of each scale in the objectness term.
        max_ratio: See :func:`~mmzsq.models.yolov5.assignment.find_candidates`.

    Returns:
        The box (1 - CIoU), objectness and class terms: scalars in float32.
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
        _GatherOutputs.apply(scale_map, num_anchors, *cell) for scale_map, *cell in zip(maps, x, y, strict=True)
    ]
    chosen = torch.stack([outputs for _, outputs in selected])

    of_scale = (-1, 1, 1, 1, 1)
    bboxes = decode_bboxes(chosen[..., :4], x, y, anchors[:, None, None, :, None], stride.view(of_scale))
    iou = complete_iou(bboxes, targets.bboxes[:, :, None, None].float())
    count = mean_in_update(matched.sum((1, 2, 3, 4), keepdim=True).to(iou.dtype))
    weight = matched / count.clamp(min=1 / part_count(in_update=True))
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
    # Weights that give the mean over the cells of each scale, times the weight of the scale.
    of_cell = torch.cat(
        [
            torch.full((count,), share / (images * count), device=device)
            for share, count in zip(balance, cells, strict=True)
        ]
    )
    loss_obj = F.binary_cross_entropy_with_logits(
        torch.cat([logits for logits, _ in selected], dim=1), objectness, of_cell, reduction='sum'
    )
    shares = row_shares([images], device, in_update=True)
    return loss_bbox, loss_obj if shares is None else loss_obj * shares[0], loss_cls


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """Create a tensor (n,), long, on the device without a copy from the host, which would synchronize."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class _GatherOutputs(torch.autograd.Function):
    """Gather the values that the loss reads from one scale's map, with a backward that writes a single gradient map.

    With PyTorch's operators, the backward would create three maps that are almost all zeros: one for the objectness,
    one for the gathered outputs, and their sum. Here the gradient also keeps the memory layout of the map.

    Inputs: the map (N, A*(5+C), H, W), the number of anchors A, and the column and row of the candidate cells of each
    target, both long (N, M, 1, S).

    Outputs in float32: objectness logits (N, A*H*W), and all outputs of the candidate cells (N, M, A, S, 5+C).
    """

    @staticmethod
    def forward(ctx: Any, scale_map: Tensor, num_anchors: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the values."""
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
        """Compute the gradient of the map."""
        image, anchor, x, y = ctx.saved_tensors
        images, anchors, outputs, rows, columns = ctx.shape
        grad_objectness = grad_objectness.view(images, anchors, rows, columns)
        # index_put_ with accumulation sums in a fixed order; scatter_add does not.
        if ctx.channels_last:
            grad = grad_chosen.new_zeros((images, rows, columns, anchors, outputs), dtype=ctx.dtype)
            grad.index_put_((image, y, x, anchor), grad_chosen.to(ctx.dtype), accumulate=True)
            grad[..., 4] += grad_objectness.permute(0, 2, 3, 1)
            return grad.flatten(3).permute(0, 3, 1, 2), None, None, None
        grad = grad_chosen.new_zeros(ctx.shape, dtype=ctx.dtype)
        grad.permute(0, 1, 3, 4, 2).index_put_((image, anchor, y, x), grad_chosen.to(ctx.dtype), accumulate=True)
        grad[:, :, 4] += grad_objectness
        return grad.flatten(1, 2), None, None, None
