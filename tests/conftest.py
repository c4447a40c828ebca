# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, and the settings that keep them small and repeatable on two cores."""

from __future__ import annotations

import os
from pathlib import Path

# Before numpy and torch are imported: tiny tensors lose time to thread pools.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch

import mmzsq  # noqa: F401  before any test imports mmdet or mmcv.ops

REPO = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(scope='session')
def repo() -> Path:
    """Root of the source tree."""
    return REPO


@pytest.fixture(scope='session')
def shared() -> Path:
    """Folder beside the source tree with real data and weights; skips where there is none."""
    path = REPO.parent / 'shared'
    if not (path / 'data').is_dir():
        pytest.skip(f'no real data: {path} does not exist')
    return path


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``cuda`` where there is no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))
