# SPDX-License-Identifier: Apache-2.0
"""Random sampling with fixed shapes, used by both stages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_subset(eligible: Tensor, keys: Tensor, max_count: int, count: Tensor | None = None) -> Tensor:
    """Sample entries of each row without replacement, without waiting for the device.

    Args:
        eligible: Entries to sample from, (N, A), bool.
        keys: Uniform random numbers in [0, 1), (N, A). Eligible entries with the largest keys are sampled.
        max_count: Maximum number of samples per row. All eligible entries are sampled if there are fewer.
        count: Number of samples of each row, (N,), at most ``max_count``; None means ``max_count`` for every row.

    Returns:
        Mask of the sampled entries, (N, A), bool.

    Example:
        >>> random_subset(torch.tensor([[True, False, True, True]]), torch.tensor([[0.1, 0.9, 0.5, 0.3]]), 2)
        tensor([[False, False,  True,  True]])
    """
    ranked = torch.where(eligible, keys, -1.0).topk(min(max_count, keys.shape[1])).values
    # Keys are below 1, so a threshold of 1 samples nothing from a row.
    thresholds = F.pad(ranked, (1, 0), value=1.0)
    if count is None:
        threshold = thresholds[:, -1]
    else:
        row = torch.arange(len(keys), device=keys.device)
        threshold = thresholds[row, count.clamp(max=thresholds.shape[1] - 1)]
    return eligible & (keys >= threshold[:, None])
