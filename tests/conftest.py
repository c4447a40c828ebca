# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, and the settings that keep them small and repeatable on two cores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

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


@pytest.fixture(scope='session')
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that nothing is left in it."""
    copy = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(repo / name, copy)
    shutil.copy(repo / 'model-index.yml', copy)
    for name in ('mmzsq', 'configs', 'tools', 'requirements', 'tests'):
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=ignored)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    subprocess.run([*command, '-w', copy / 'dist', copy], check=True, timeout=300)
    return next((copy / 'dist').glob('*.whl'))


@pytest.fixture(scope='session')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the content of the wheel, as in site-packages: to be put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp('site')
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


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
