# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing, which cannot compute the gradient of an image, is off in teacher and student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from mmzsq.models.gradient_checkpointing import turn_off_checkpointing
from mmzsq.qat import ZeroShotDetector

QUANTIZER = dict(type='mmzsq.LSQ', w_bits=8, a_bits=8)


def gradient_of(net: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    [gradient] = torch.autograd.grad(sum(level.square().mean() for level in net(image)), image)
    return gradient


def test_the_gradient_of_an_image_is_that_without_checkpoints() -> None:
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    with_checkpoints = ResNet(18, base_channels=8, stem_channels=8, with_cp=True)
    without = ResNet(18, base_channels=8, stem_channels=8)
    for net in (with_checkpoints, without):
        # MMDetection's method returns nothing.
        net.eval()
    without.load_state_dict(with_checkpoints.state_dict())
    with pytest.raises(RuntimeError, match='checkpoint is incompatible with .grad'):
        gradient_of(with_checkpoints, image)
    turn_off_checkpointing(with_checkpoints)
    assert torch.equal(gradient_of(with_checkpoints, image), gradient_of(without, image))


def test_teacher_and_student_have_none(tiny_cfg: Any, tmp_path: Path) -> None:
    register_all_modules()
    cfg = tiny_cfg('retinanet_r18')
    cfg['backbone']['with_cp'] = True
    torch.save(dict(state_dict=MODELS.build(copy.deepcopy(cfg)).state_dict()), tmp_path / 'teacher.pth')
    model = ZeroShotDetector(cfg, QUANTIZER, teacher=str(tmp_path / 'teacher.pth'))
    for detector in (model.student, model.load_teacher()):
        assert not any(getattr(module, 'with_cp', False) for module in detector.modules())
