# SPDX-License-Identifier: Apache-2.0
"""A whole run in seconds: the shapes detector with random weights, a handful of 64 px images, few iterations."""

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

from mmzsq.engine import ZeroShotRunner, report

TINY = {
    'load_from': 'teacher.pth',
    'zsq.calibration_set.num_images': 3,
    'zsq.calibration_set.batch_size': 2,
    'zsq.label_sampler.warmup': 1,
    'zsq.label_sampler.interval': 1,
    'zsq.synthesis.relabel': dict(image_size=64, iterations=2, batch_size=2),
    'zsq.synthesis.refine': None,
    'zsq.synthesis.synthesize': dict(image_size=96, iterations=1, batch_size=2),
    'zsq.train.max_epochs': 2,
    'zsq.train.batch_size': 2,
    'zsq.train.num_workers': 0,
    'default_hooks.checkpoint.interval': 1,
    'zsq.train.init_batches': 1,
    **{
        f'{loader}.{key}': value
        for loader in ('val_dataloader', 'test_dataloader')
        for key, value in {
            'batch_size': 2,
            'num_workers': 0,
            'persistent_workers': False,
            'dataset.num_images': 2,
            'dataset.image_size': 64,
        }.items()
    },
}

MakeConfig = Callable[..., Config]
MakeRunner = Callable[..., ZeroShotRunner]


@pytest.fixture(scope='session')
def teacher(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a teacher that detects objects: random weights, BatchNorm statistics of random images."""
    register_all_modules()
    detector = MODELS.build(Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model)
    torch.manual_seed(3)
    detector.init_weights()
    with torch.no_grad():
        for _ in range(30):
            detector.train()(torch.rand(4, 3, 64, 64), mode='tensor')
        for convolution in detector.bbox_head.modules():
            if isinstance(convolution, torch.nn.Conv2d):
                convolution.bias.fill_(0.0)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'state_dict': detector.state_dict()}, path)
    return path


@pytest.fixture(scope='session')
def configure(repo: Path, teacher: Path) -> MakeConfig:
    """Function that makes the config of a tiny run in ``work_dir``, a path."""

    def configure(work_dir: Path, **options: Any) -> Config:
        cfg = Config.fromfile(repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')
        # Merging empties the options of their _delete_.
        cfg.merge_from_dict(copy.deepcopy({**TINY, 'load_from': str(teacher), **options}))
        cfg.work_dir = str(work_dir)
        cfg.launcher = 'none'
        cfg.experiment_name = f'{work_dir.parent.name}_{work_dir.name}'
        return cfg

    return configure


@pytest.fixture
def make_config(configure: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """Function that makes the config of a tiny run in a folder of the test, which is also the current folder."""
    monkeypatch.chdir(tmp_path)
    # Same content without layout: MMEngine formats a config by yapf six times a run, a second each.
    monkeypatch.setattr(Config, 'pretty_text', property(plain_text))
    # Figures take seconds a run: test_details.py writes a report.
    monkeypatch.setattr(report, 'write_details', lambda *args: None)
    return lambda work_dir='out', **options: configure(tmp_path / work_dir, **options)


@pytest.fixture
def make_runner(make_config: MakeConfig) -> MakeRunner:
    """Function that builds the runner of a tiny run, see ``make_config``."""
    return lambda *args, **options: ZeroShotRunner.from_cfg(make_config(*args, **options))


def plain_text(cfg: Config) -> str:
    return ''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items())
