# SPDX-License-Identifier: Apache-2.0
"""A detector's own training losses, with everything but the network in fp32 under autocast."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmzsq.tasks.mixed_precision import autocast_network_only
from mmzsq.tasks.mmdet_divisors import mmdet_update_means
from mmzsq.tasks.padded_task import takes_padded_targets


def detection_losses(detector: nn.Module, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
    """Compute ``detector.loss`` in the precision of autocast, if it is on.

    Heads that take padded targets are left to autocast, since their losses are made for it. Of all other detectors,
    only the network runs in 16 bits; see :func:`~mmzsq.tasks.mixed_precision.autocast_network_only`. In an update in
    parts, their losses divide by means over all parts; see :mod:`~mmzsq.tasks.mmdet_divisors`.

    Args:
        detector: Any detector, in the mode in which its loss is to be computed.
        inputs: Normalized images (N, 3, H, W).
        data_samples: The labels, as ``detector.loss`` takes them.

    Returns:
        The loss terms by name.
    """
    owner: Any = detector
    if takes_padded_targets(detector):
        return dict(owner.loss(inputs, data_samples))
    with autocast_network_only(detector), mmdet_update_means(detector):
        return dict(owner.loss(inputs, data_samples))
