# SPDX-License-Identifier: Apache-2.0
"""Values between layers are compared on the grid of the layer that reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from quantized_networks import Flat, lowered, quantized
from torch import nn

from mmzsq.deploy.heads import Part
from mmzsq.deploy.layer_checks import LayerCheck, _Pieces, check_layers
from mmzsq.deploy.markers import ActivationGrid
from mmzsq.quantization import QuantizationConfig, calibrating, prepare, quantized_layers

GRID = ActivationGrid(step=0.1, zero_point=10, qmin=0, qmax=255, bits=8)


def fault(expected: torch.Tensor, given: np.ndarray) -> str | None:
    piece: Any = SimpleNamespace(_between=lambda value, grid: ([], [], True), _run=lambda *_: given, values={})
    return _Pieces._check_between(piece, 'value', expected, GRID)[1]


@pytest.fixture
def values() -> torch.Tensor:
    return torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 20


def test_one_side_may_be_rounded_to_the_grid_already(values: torch.Tensor) -> None:
    rounded = torch.fake_quantize_per_tensor_affine(values, 0.1, 10, 0, 255)
    # One value in front of a coarse grid fell to the other side of a tie.
    rounded[7] += 0.5
    assert fault(values, rounded.numpy()) is None


def test_values_of_another_grid_are_a_fault(values: torch.Tensor) -> None:
    coarse = torch.fake_quantize_per_tensor_affine(values, 0.5, 2, 0, 255)
    assert 'differ from PyTorch' in str(fault(values, coarse.numpy()))


def _checked(model: nn.Module, x: torch.Tensor, outputs: list[str]) -> tuple[list[LayerCheck], list[str]]:
    """Export a quantized model for ONNX Runtime, and check its layers there."""
    part = Part('detector', Flat(model), x, 'images', outputs, 0, [])
    content = lowered(model, x, 'onnxruntime', output_names=outputs).model.SerializeToString()
    return check_layers(model, part, content, x, 'onnxruntime', 'onnxruntime')


class _ActivationBeforeNorm(nn.Module):
    """A convolution whose activation function works in place, in front of a BatchNorm."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation, self.last = nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.running_var, 2.0, 3.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(self.norm(self.activation(self.conv(x)))),)


@pytest.mark.parametrize('activation', [nn.ReLU(inplace=True), nn.ReLU(), nn.Identity()])
def test_a_batch_norm_behind_an_activation_in_place_is_not_that_of_the_layer(activation: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    model = _ActivationBeforeNorm(activation)
    quantized(model, x)
    checks, failures = _checked(model, x, ['map'])
    assert [check.reason for check in checks] == [None, None]
    assert not failures


class _TopOfPyramid(nn.Module):
    """A value that a layer and a sum read, as the top level of an FPN: it has a grid of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral, self.lower = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.top, self.bottom = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top = self.lateral(x)
        return self.top(top), self.bottom(self.lower(x) + top)


class _ConstantInput(nn.Module):
    """A layer that reads positions, which depend on the size of the image alone, as generalized attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.positions = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(1, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        rows = torch.arange(x.shape[2])[:, None] / 7
        return (self.conv(x) + self.positions(rows).T[None, :, :, None],)


@pytest.mark.parametrize('model', [_TopOfPyramid(), _ConstantInput()])
def test_values_that_are_rounded_for_all_readers_or_constant_are_no_fault(model: nn.Module) -> None:
    x = torch.randn(1, 3, 8, 8)
    config = QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same', outputs=8))
    prepare(model.eval(), config, run=lambda: model(x))
    with torch.no_grad(), calibrating(model):
        model(x)
    checks, failures = _checked(model, x, [f'map{index}' for index in range(len(model(x)))])
    assert [check.reason for check in checks] == [None] * len(checks)
    assert len(checks) == len(list(quantized_layers(model)))
    assert not failures


class _UnlikelyScores(nn.Module):
    """Scores that are tiny everywhere, as those of a detector of one category on noise."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.conv, self.error = nn.Conv2d(3, 2, 1), error
        nn.init.constant_(self.conv.bias, -18.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        exporting = torch.jit.is_tracing()
        return (self.conv(x).sigmoid() + self.error * exporting,)


@pytest.mark.parametrize(('error', 'same'), [(0.0, True), (1e-5, False)])
def test_the_tail_of_an_engines_sigmoid_is_no_fault(error: float, same: bool) -> None:
    x = torch.randn(1, 3, 8, 8)
    model = _UnlikelyScores(error)
    quantized(model, x)
    _, failures = _checked(model, x, ['scores'])
    assert bool(failures) != same
