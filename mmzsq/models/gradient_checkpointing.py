# SPDX-License-Identifier: Apache-2.0
"""Turn off gradient checkpointing, a setting of float training.

A reentrant checkpoint, as MMDetection's ``with_cp=True`` makes, refuses to compute the gradient of an image. It also
hides layers from a search of the autograd graph, and recomputing a block calls the hooks in it a second time.
"""

from __future__ import annotations

from torch import nn

FLAGS = ('with_cp', 'use_checkpoint', 'grad_checkpointing', 'gradient_checkpointing')
"""Attributes that turn it on in modules of OpenMMLab, Swin, timm and Transformers."""


def turn_off_checkpointing(model: nn.Module) -> None:
    """Set the flags of all modules of ``model`` that turn on gradient checkpointing to False."""
    for module in model.modules():
        for flag in FLAGS:
            if getattr(module, flag, None) is True:
                setattr(module, flag, False)
