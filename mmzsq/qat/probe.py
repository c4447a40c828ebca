# SPDX-License-Identifier: Apache-2.0
"""One run of a detector in which every layer takes part, for what quantization learns from a run."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.mmcv_ops.torchvision_ops import MissingOperatorError
from mmzsq.models.train_eval_modes import eval_mode
from mmzsq.patching import patched
from mmzsq.tasks.detection_task import whole_image_samples

SIZES = (64, 128, 256, 512, 1024)
"""Sides of the image that are tried, in pixels."""


def probe_size(detector: nn.Module) -> int:
    """The least of :data:`SIZES` at which ``detector`` runs: some take more queries than a small image has places.

    Raises:
        Exception: What the detector raises at the largest.
    """
    for size in SIZES:
        try:
            with torch.no_grad(), eval_mode(detector, keep=()):
                probe(detector, size)
        except MissingOperatorError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            if size == SIZES[-1]:
                raise
        else:
            break
    return size


def probe(detector: nn.Module, image_size: int = 64) -> Any:
    """Run ``detector`` once on a gray image, for what :func:`~mmzsq.quantization.prepare` learns from a run.

    A two-stage detector proposes what its weights make it propose, untrained ones perhaps nothing. Here its second
    stage always gets one proposal an image, the image itself, so that every layer runs and operations do not depend on
    the weights. The image is labeled as an object too: QueryInst predicts masks of what matches a label.

    Args:
        detector: A float detector.
        image_size: Side of the image in pixels.

    Returns:
        The raw outputs.

    Raises:
        MissingOperatorError: If a part of the detector needs a full MMCV, and which.
    """
    device = next(detector.parameters()).device
    inputs = torch.zeros(1, 3, image_size, image_size, device=device)
    samples = whole_image_samples(1, (image_size, image_size), device)
    whole_image = torch.tensor([[0.0, 0.0, image_size, image_size]], device=device)
    with _proposing(whole_image, getattr(detector, 'roi_head', None)):
        try:
            return detector(inputs, samples, mode='tensor')
        except MissingOperatorError as error:
            raise MissingOperatorError(error.operator, _part_that_raised(detector, error)) from error


def _part_that_raised(detector: nn.Module, error: Exception) -> str:
    """The innermost module of ``detector`` that was running when ``error`` was raised, as the config names it."""
    names = {module: name for name, module in detector.named_modules() if name}
    running = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = next(module for module in reversed(running) if isinstance(module, nn.Module) and module in names)
    return f'{names[module]} ({type(module).__name__}) of {type(detector).__name__}'


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

    with patched(roi_head, 'forward', with_one_proposal):
        yield
