# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests, and the settings that keep them small and repeatable on two cores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

# Set before numpy and torch are imported: thread pools slow down tiny tensors.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from mmengine.config import Config

import mmzsq  # noqa: F401  before any test imports mmdet or mmcv.ops

pytest_plugins = ['cuda_fixtures']

REPO = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(scope='session')
def repo() -> Path:
    """Root of the source tree."""
    return REPO


@pytest.fixture(scope='session')
def shared() -> Path:
    """Folder beside the source tree with real data and weights; skips the test if it is missing."""
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
    for name in ('mmzsq', 'configs', 'tools', 'benchmarks', 'requirements', 'tests'):
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=ignored)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    subprocess.run([*command, '-w', copy / 'dist', copy], check=True, timeout=300)
    return next((copy / 'dist').glob('*.whl'))


@pytest.fixture(scope='session')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the content of the wheel, as in site-packages, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp('site')
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


TINY_SWIN = dict(
    type='SwinTransformer', embed_dims=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), drop_path_rate=0.2, init_cfg=None
)
TINY_MASK_RCNN = {
    'model.backbone': dict(depth=18, base_channels=8, init_cfg=None),
    'model.neck': dict(in_channels=[8, 16, 32, 64], out_channels=16),
    'model.rpn_head': dict(in_channels=16, feat_channels=16),
    'model.roi_head.bbox_roi_extractor.out_channels': 16,
    'model.roi_head.bbox_head': dict(in_channels=16, fc_out_channels=32, num_classes=3),
}
TINY_MASKS = {
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.mask_head': dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3),
}
TINY_STAGES = {
    f'model.roi_head.{head}.{stage}': changes
    for head, changes in (
        ('bbox_head', dict(in_channels=16, fc_out_channels=32, num_classes=3)),
        ('mask_head', dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3)),
    )
    for stage in range(3)
}
TINY_HTC = {
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.semantic_roi_extractor.out_channels': 16,
    'model.roi_head.semantic_head': dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=5),
}
TINY_NECK = {key: TINY_MASK_RCNN[key] for key in TINY_MASK_RCNN if not key.endswith('.bbox_head')}
TINY_DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    'mask-rcnn_r18': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', TINY_MASK_RCNN | TINY_MASKS),
    'mask-rcnn_swin': (
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        TINY_MASK_RCNN | TINY_MASKS | {'model.backbone': TINY_SWIN},
    ),
    'faster-rcnn_r18': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', TINY_MASK_RCNN),
    'cascade-rcnn_r18': (
        'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
        TINY_NECK | {key: value for key, value in TINY_STAGES.items() if 'bbox_head' in key},
    ),
    'htc_r18': ('htc/htc_r50_fpn_1x_coco.py', TINY_NECK | TINY_STAGES | TINY_HTC),
    'retinanet_r18': (
        'retinanet/retinanet_r18_fpn_1x_coco.py',
        {
            'model.backbone': dict(base_channels=8, init_cfg=None),
            'model.neck': dict(in_channels=[8, 16, 32, 64], out_channels=8),
            'model.bbox_head': dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1),
        },
    ),
    'yolov5': (str(REPO / 'configs/shapes/yolov5-p_shapes.py'), {}),
}
"""By name: MMDetection's own configs, with few channels and three classes, and the detector that ships."""


@pytest.fixture(scope='session')
def tiny_cfg() -> Callable[[str], Any]:
    """Config of a model of TINY_DETECTORS, by name; a new one each call."""
    import mmdet
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'

    def tiny_cfg(name: str) -> Any:
        path, changes = TINY_DETECTORS[name]
        cfg = Config.fromfile(configs / path)
        cfg.merge_from_dict(changes)
        return cfg.model

    return tiny_cfg


@pytest.fixture
def zero_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build layers without initializing their weights, which takes most of the time."""
    from mmcv.cnn import ConvModule

    def zero(layer: Any) -> None:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)

    for cls in (torch.nn.Linear, torch.nn.modules.conv._ConvNd):
        monkeypatch.setattr(cls, 'reset_parameters', zero)
    monkeypatch.setattr(ConvModule, 'init_weights', lambda module: None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``cuda`` without a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))


@pytest.fixture
def unformatted_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print configs without layout: yapf takes longer than all the rest of a small run."""
    lines = property(lambda cfg: ''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items()))
    monkeypatch.setattr(Config, 'pretty_text', lines)
