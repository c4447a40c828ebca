# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of YOLO26."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn


@pytest.fixture(scope='session')
def tiny_model(repo: Path) -> Callable[[], dict[str, Any]]:
    """Function that returns a new config of a model with half the width of size n and three classes."""
    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/yolo26/yolo26-n_coco.py').model
    for part in ('backbone', 'neck', 'bbox_head'):
        cfg[part].update(widen_factor=0.125, max_channels=512)
    cfg.bbox_head.num_classes = 3
    return lambda: copy.deepcopy(cfg.to_dict())


@pytest.fixture
def detector(tiny_model: Callable[[], dict[str, Any]]) -> nn.Module:
    """A tiny detector with random weights and BatchNorm statistics moved toward those of random images."""
    model = MODELS.build(tiny_model())
    model.bbox_head.init_weights()
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.rand(4, 3, 64, 64), mode='tensor')
    return model.eval()
