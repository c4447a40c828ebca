# SPDX-License-Identifier: Apache-2.0
"""How a trained detector acts while a loss of its own is asked for.

Heads of MMDetection return other numbers in train mode, or more of them: FCOS offsets in strides, VFNet the boxes
before refinement, SOLO logits, DINO what it makes of denoising queries. Their losses take these and no others.
Normalization with batch statistics and random drops, which go by the same flag, would change the detector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmcv.cnn.bricks import DropPath
from mmdet.models.layers import DropBlock
from mmengine.logging import MessageHub
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

RANDOM_MODULES = (_DropoutNd, DropPath, DropBlock, nn.MultiheadAttention)
"""Modules that in train mode, and for nothing else, drop at random."""

LAST_EPOCH = 10**6
"""Of a detector that is trained: losses with a warm-up, as TOOD's, are past it."""


@contextmanager
def frozen_train_mode(detector: nn.Module) -> Iterator[None]:
    """Inside the block ``detector`` acts as in the last epoch of its training, but for BatchNorm and what drops.

    These keep their mode; what requires a gradient stays so too.
    """
    steady = (*RANDOM_MODULES, _BatchNorm)
    switched = [module for module in detector.modules() if not module.training and not isinstance(module, steady)]
    hub = MessageHub.get_current_instance()
    epoch = hub.get_info('epoch')
    hub.update_info('epoch', LAST_EPOCH)
    try:
        # Not `train()`, which detectors and backbones redefine.
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
    """Inside the block ``detector`` acts as when it predicts, but for modules of the classes ``keep``."""
    switched = [module for module in detector.modules() if module.training and not isinstance(module, keep)]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def single_process() -> Iterator[None]:
    """Inside the block nothing is exchanged with other processes.

    Many heads of MMDetection divide their losses by a number of objects averaged over all processes. In training that
    is right. In synthesis each process has images of its own, and not as many as the others: images would depend on
    how many processes there are, and one would wait for another that has none left.
    """
    is_initialized = distributed.is_initialized
    distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        distributed.is_initialized = is_initialized
