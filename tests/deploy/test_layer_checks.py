# SPDX-License-Identifier: Apache-2.0
"""Values between layers are compared on the grid of the layer that reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmzsq.deploy.layer_checks import _Pieces
from mmzsq.deploy.markers import ActivationGrid

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
