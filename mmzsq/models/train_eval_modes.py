# SPDX-License-Identifier: Apache-2.0
"""Context managers that switch a detector between train and eval mode without changing its function.

In train mode, heads of MMDetection return other values, or more of them, than in eval mode. FCOS returns distances in
units of the stride, VFNet also the boxes before refinement, SOLO logits, and DINO the outputs of denoising queries.
Their losses accept only these. But the same flag also switches normalization to batch statistics and turns on random
dropping, both of which would change the detector.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmcv.cnn.bricks import DropPath
from mmdet.models.layers import DropBlock
from mmengine.logging import MessageHub
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmzsq.patching import patched

RANDOM_MODULES = (_DropoutNd, DropPath, DropBlock, nn.MultiheadAttention)
"""Modules whose train mode differs from eval mode only by random dropping."""

LAST_EPOCH = 10**6
"""Epoch number of a fully trained detector. Losses with a warm-up, such as that of TOOD, are past it."""


@contextmanager
def frozen_train_mode(detector: nn.Module) -> Iterator[None]:
    """Switch a detector to train mode inside the block, except for BatchNorm and modules that drop at random.

    The excepted modules keep their mode. MMEngine's message hub reports :data:`LAST_EPOCH`. ``requires_grad`` is not
    changed.

    Args:
        detector: Any detector.
    """
    excepted = (*RANDOM_MODULES, _BatchNorm)
    switched = [module for module in detector.modules() if not module.training and not isinstance(module, excepted)]
    hub = MessageHub.get_current_instance()
    epoch = hub.get_info('epoch')
    hub.update_info('epoch', LAST_EPOCH)
    try:
        # Detectors and backbones override `train()`, so the flag is set directly.
        for module in switched:
            module.training = True
        yield
    finally:
        for module in switched:
            module.training = False
        if epoch is None:
            hub.pop_info('epoch')
        else:
            hub.update_info('epoch', epoch)


@contextmanager
def eval_mode(detector: nn.Module, keep: tuple[type[nn.Module], ...] = (_BatchNorm,)) -> Iterator[None]:
    """Switch a detector to eval mode inside the block.

    Args:
        detector: Any detector.
        keep: Classes of the modules that keep their mode.
    """
    switched = [module for module in detector.modules() if module.training and not isinstance(module, keep)]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def kept_buffers(detector: nn.Module) -> Iterator[None]:
    """Restore the buffers of a detector at the end of the block, such as statistics that a loss updates.

    Args:
        detector: Any detector.
    """
    buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def single_process() -> Iterator[None]:
    """Disable communication between processes inside the block.

    Many heads of MMDetection divide their loss by the number of objects averaged over all processes. This is right in
    training. In synthesis, each process has its own images, and their number can differ. With communication, images
    would depend on the number of processes, and a process would wait for others that have already finished.

    ``torch.distributed.is_initialized`` returns False inside the block, because heads and their helpers all ask it
    before they communicate. Only the calling thread is affected. Other threads get the true answer.
    """
    is_initialized = distributed.is_initialized
    caller = threading.get_ident()

    def outside_caller() -> bool:
        return threading.get_ident() != caller and is_initialized()

    with patched(distributed, 'is_initialized', outside_caller):
        yield
