# SPDX-License-Identifier: Apache-2.0
"""One run of a detector in which every layer takes part, for what quantization learns from a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.detectors.task import blank_samples


def probe(detector: nn.Module, image_size: int = 64) -> Any:
    """Run ``detector`` once on a grey image, for what :func:`~mmzsq.quantization.prepare` learns from a run.

    A two-stage detector proposes what its weights make it propose, untrained ones perhaps nothing. Here its second
    stage always gets one proposal an image, the image itself, so that every layer runs and operations do not depend on
    the weights.

    Args:
        detector: A float detector.
        image_size: Side of the image in pixels.

    Returns:
        The raw outputs.
    """
    device = next(detector.parameters()).device
    inputs = torch.zeros(1, 3, image_size, image_size, device=device)
    samples = blank_samples(1, (image_size, image_size), device)
    whole_image = torch.tensor([[0.0, 0.0, image_size, image_size]], device=device)
    with _proposing(whole_image, getattr(detector, 'roi_head', None)):
        return detector(inputs, samples, mode='tensor')


@contextmanager
def _proposing(bboxes: Tensor, roi_head: Any) -> Iterator[None]:
    """Inside the block ``roi_head`` gets one proposal an image, ``bboxes`` (1, 4), whatever was proposed."""
    if roi_head is None:
        yield
        return
    forward = roi_head.forward

    def with_one_proposal(x: Any, proposals: Sequence[InstanceData], *args: Any, **kwargs: Any) -> Any:
        # What else belongs to a proposal, such as a query, stays with it.
        first = [result[:1] if len(result) else InstanceData() for result in proposals]
        for result in first:
            result.bboxes = bboxes
        return forward(x, first, *args, **kwargs)

    roi_head.forward = with_one_proposal
    try:
        yield
    finally:
        del roi_head.forward
