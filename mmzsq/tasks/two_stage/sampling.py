# SPDX-License-Identifier: Apache-2.0
"""What both stages share: a random choice with fixed shapes, and the losses of boxes before any reduction."""

from __future__ import annotations

import torch
from mmdet.models.losses import SmoothL1Loss
from torch import Tensor, nn
from torch.nn import functional as F


def draw(eligible: Tensor, keys: Tensor, most: int, count: Tensor | None = None) -> Tensor:
    """Choose entries of each row at random, without waiting for how many there are.

    Args:
        eligible: What can be chosen, (N, A), bool.
        keys: Uniform random numbers in [0, 1), (N, A); an entry of a higher key comes first.
        most: How many to choose in a row, if there are as many.
        count: How many of each row, (N,), at most ``most``; None: ``most``.

    Returns:
        What was chosen, (N, A), bool.

    Example:
        >>> draw(torch.tensor([[True, False, True, True]]), torch.tensor([[0.1, 0.9, 0.5, 0.3]]), 2)
        tensor([[False, False,  True,  True]])
    """
    ranked = torch.where(eligible, keys, -1.0).topk(min(most, keys.shape[1])).values
    # No key reaches 1: the threshold of a row from which nothing is chosen.
    thresholds = F.pad(ranked, (1, 0), value=1.0)
    if count is None:
        threshold = thresholds[:, -1]
    else:
        row = torch.arange(len(keys), device=keys.device)
        threshold = thresholds[row, count.clamp(max=thresholds.shape[1] - 1)]
    return eligible & (keys >= threshold[:, None])


def elementwise_loss(loss: nn.Module, predictions: Tensor, targets: Tensor) -> Tensor:
    """What MMDetection's ``L1Loss`` or ``SmoothL1Loss`` computes before it weighs and averages.

    Args:
        loss: Tells which, and its ``beta``.
        predictions: Any shape.
        targets: The same shape.
    """
    if isinstance(loss, SmoothL1Loss):
        return F.smooth_l1_loss(predictions, targets, reduction='none', beta=loss.beta)
    return F.l1_loss(predictions, targets, reduction='none')
