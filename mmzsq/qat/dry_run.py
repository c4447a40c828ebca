# SPDX-License-Identifier: Apache-2.0
"""Dry run that executes every layer of a detector, to find its first and last layers and to count MACs."""

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
"""Image sides to try, in pixels."""


def dry_run_size(detector: nn.Module) -> int:
    """Return the smallest of :data:`SIZES` at which ``detector`` runs.

    Some detectors need more queries than a small image has locations.

    Args:
        detector: A float detector.

    Returns:
        Side of a square image in pixels.

    Raises:
        MissingOperatorError: If a module of the detector needs a full MMCV.
        Exception: The error of the detector at the largest size, if it runs at none.
    """
    for size in SIZES:
        try:
            with torch.no_grad(), eval_mode(detector, keep=()):
                dry_run(detector, size)
        except MissingOperatorError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            if size == SIZES[-1]:
                raise
        else:
            break
    return size


def dry_run(detector: nn.Module, image_size: int = 64) -> Any:
    """Run ``detector`` once on a uniform gray image, for :func:`~mmzsq.quantization.prepare`.

    The number of proposals of a two-stage detector depends on its weights, and an untrained detector may have none.
    Here the second stage always gets one proposal per image, the whole image, so that every layer runs and the
    number of operations does not depend on the weights. The image also has a label that covers it, because QueryInst
    predicts masks only for proposals that match a label.

    Args:
        detector: A float detector.
        image_size: Side of the image in pixels.

    Returns:
        The raw outputs of mode ``'tensor'``.

    Raises:
        MissingOperatorError: If a module of the detector needs a full MMCV. The message names the module.
    """
    device = next(detector.parameters()).device
    inputs = torch.zeros(1, 3, image_size, image_size, device=device)
    samples = whole_image_samples(1, (image_size, image_size), device)
    whole_image = torch.tensor([[0.0, 0.0, image_size, image_size]], device=device)
    with _single_proposal(whole_image, getattr(detector, 'roi_head', None)):
        try:
            return detector(inputs, samples, mode='tensor')
        except MissingOperatorError as error:
            raise MissingOperatorError(error.operator, _module_that_raised(detector, error)) from error


def _module_that_raised(detector: nn.Module, error: Exception) -> str:
    """Return the innermost module of ``detector`` that was running when ``error`` was raised, for a message."""
    names = {module: name for name, module in detector.named_modules() if name}
    running = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = next(module for module in reversed(running) if isinstance(module, nn.Module) and module in names)
    return f'{names[module]} ({type(module).__name__}) of {type(detector).__name__}'


@contextmanager
def _single_proposal(bboxes: Tensor, roi_head: Any) -> Iterator[None]:
    """Replace the proposals of each image by one inside the block.

    Args:
        bboxes: The box of this proposal, (1, 4), xyxy pixels.
        roi_head: The RoI head that gets it, or None.
    """
    if roi_head is None:
        yield
        return
    forward = roi_head.forward

    def with_one_proposal(x: Any, proposals: Sequence[InstanceData], *args: Any, **kwargs: Any) -> Any:
        # Keeps the other fields of a proposal, such as its query.
        first = [result[:1] if len(result) else InstanceData() for result in proposals]
        for result in first:
            result.bboxes = bboxes
        return forward(x, first, *args, **kwargs)

    with patched(roi_head, 'forward', with_one_proposal):
        yield
