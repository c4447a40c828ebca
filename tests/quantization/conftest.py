# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a small network that uses layers in all the ways that detectors do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightStandardized(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class TinyDetector(nn.Module):
    """Stem, in-place activations, shortcut, one head shared by two levels, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])
        self.standardized = WeightStandardized(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed = nn.Linear(8, 8)
        self.cls = nn.Conv2d(8, 2, 1)
        self.reg = nn.Conv2d(8, 4, 1)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Map images (N, 3, H, W) to two levels of class and box maps."""
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        x = x + F.silu(self.block[1](F.silu(self.block[0](x))))
        x = self.standardized(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.embed(self.attention(tokens, tokens, tokens)[0]).relu_()
        x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        levels = [x, F.max_pool2d(x, 2)]
        return {'cls': [self.cls(f) for f in levels], 'reg': [self.reg(f) for f in levels]}


@pytest.fixture
def model() -> TinyDetector:
    """A float model in eval mode, with BN statistics that are not trivial."""
    model = TinyDetector().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
        model.bn.weight.normal_()
        model.bn.bias.normal_()
    return model


@pytest.fixture
def images() -> Tensor:
    """Two images of 8 x 8 pixels."""
    return torch.rand(2, 3, 8, 8)
