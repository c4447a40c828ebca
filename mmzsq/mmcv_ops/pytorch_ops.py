# SPDX-License-Identifier: Apache-2.0
"""Operators of ``mmcv._ext`` that torchvision lacks, written in PyTorch with the signatures of MMCV 2.1.0.

Detectors call them in places that do not look like layers: soft NMS is selected by ``test_cfg``, and PISA's sampler
uses NMS groups. Focal loss and multi-scale deformable attention have a PyTorch implementation in MMCV and MMDetection,
but only for the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou
from torchvision.ops import sigmoid_focal_loss as elementwise_focal_loss

NAIVE, LINEAR, GAUSSIAN = range(3)
"""Methods of :func:`softnms`, with MMCV's numbers."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Convert ``tensor`` to fp32 unless it is fp64; 16-bit types would round box coordinates."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS: lower the scores of boxes that overlap a better one (Bodla et al., 2017).

    Args:
        boxes: Boxes in xyxy pixels, (N, 4), on the CPU.
        scores: Scores, (N,).
        dets: Receives the kept boxes and their new scores in its first K rows, sorted by descending score, (N, 5).
        iou_threshold: Minimum IoU at which the naive and linear methods act.
        sigma: Width of the Gaussian method.
        min_score: A box is dropped when its score falls below this.
        method: ``NAIVE`` sets scores to 0, ``LINEAR`` multiplies them by 1 - IoU, ``GAUSSIAN`` by exp(-IoU^2 / sigma).
        offset: 0, or 1 if the width of a box from x1 to x2 is ``x2 - x1 + 1`` pixels.

    Returns:
        Indices of the kept boxes, sorted by descending score, (K,), int64.
    """
    reach = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    scores = scores.clone()
    remaining = torch.arange(len(boxes))
    kept: list[int] = []
    while len(remaining):
        best = scores[remaining].argmax()
        index = int(remaining[best])
        dets[len(kept), :4], dets[len(kept), 4] = boxes[index], scores[index]
        kept.append(index)
        remaining = torch.cat((remaining[:best], remaining[best + 1 :]))
        overlap = box_iou(reach[index : index + 1], reach[remaining])[0]
        if method == GAUSSIAN:
            factor = (-(overlap**2) / sigma).exp()
        else:
            lowered = torch.zeros_like(overlap) if method == NAIVE else 1 - overlap
            factor = torch.where(overlap >= iou_threshold, lowered, 1.0)
        scores[remaining] *= factor
        remaining = remaining[scores[remaining] >= min_score]
    return torch.tensor(kept, dtype=torch.long)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """NMS that returns, for each kept box, the boxes that it suppresses.

    Args:
        dets: Boxes in xyxy pixels and scores, (N, 5), on the CPU.
        iou_threshold: Minimum IoU at which a box joins the group of a better one.

    Returns:
        Groups of indices. Each starts with the kept box, followed by those that it suppresses, by descending score.
    """
    overlaps = box_iou(dets[:, :4], dets[:, :4])
    remaining = dets[:, 4].argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    while len(remaining):
        suppressed = overlaps[remaining[0], remaining] >= iou_threshold
        suppressed[0] = True
        groups.append(remaining[suppressed].tolist())
        remaining = remaining[~suppressed]
    return groups


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Compute the sigmoid focal loss (Lin et al., 2017) of every logit.

    Args:
        input: Logits, (N, C).
        target: Category of each row, (N,), int64; C for background.
        weight: Weight of each category's rows, (C,); background has weight 1. Empty for no weights.
        output: Receives the loss, (N, C).
        gamma: Focusing exponent.
        alpha: Weight of positive logits; negative logits have weight 1 - alpha.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the sum of :func:`sigmoid_focal_loss_forward` with respect to ``input``.

    Args:
        input: As in the forward pass.
        target: As in the forward pass.
        weight: As in the forward pass.
        grad_input: Receives the gradient, (N, C).
        gamma: As in the forward pass.
        alpha: As in the forward pass.
    """
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        total = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(total, logits)[0])


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, computed by MMCV's implementation for the CPU.

    Args:
        value: Shape (N, keys, heads, channels per head).
        spatial_shapes: Height and width of each level, (levels, 2), int64.
        level_start_index: Unused, because it follows from ``spatial_shapes``.
        sampling_locations: Sampling points of the queries, x before y, in [0, 1],
            (N, queries, heads, levels, points, 2).
        attention_weights: Shape (N, queries, heads, levels, points).
        im2col_step: Unused.

    Returns:
        Shape (N, queries, heads * channels per head).
    """
    return _attend(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, which is recomputed.

    Args:
        value: As in the forward pass.
        spatial_shapes: As in the forward pass.
        level_start_index: Unused.
        sampling_locations: As in the forward pass.
        attention_weights: As in the forward pass.
        grad_output: Gradient of the output.
        grad_value: Receives the gradient of ``value``.
        grad_sampling_loc: Receives the gradient of ``sampling_locations``.
        grad_attn_weight: Receives the gradient of ``attention_weights``.
        im2col_step: Unused.
    """
    with torch.enable_grad():
        operands = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        output = _attend(operands[0], spatial_shapes, *operands[1:])
    grads = torch.autograd.grad(output, operands, grad_output)
    for written, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        written.copy_(grad)


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    categories = logits.shape[1]
    positive = F.one_hot(target, categories + 1)[:, :categories].to(logits.dtype)
    loss = elementwise_focal_loss(logits, positive, alpha, gamma)
    return loss * F.pad(weight, (0, 1), value=1.0)[target, None] if weight.numel() else loss


def _attend(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    # Imported here, because importing mmcv.ops looks up the operators of this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, spatial_shapes, sampling_locations, attention_weights)
