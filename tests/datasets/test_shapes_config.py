# SPDX-License-Identifier: Apache-2.0
"""The configs of the drawn scenes, run by MMDetection's own training tool from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import numpy as np
import pytest
from mmengine.config import Config

from mmzsq.checkpoint import load_from_local
from mmzsq.datasets import ShapesDataset
from mmzsq.datasets.shapes_drawing import CLASS_NAMES, draw_scene

CONFIG = 'configs/shapes/yolov5-p_shapes.py'


@pytest.fixture(scope='module')
def config(repo: Path) -> Config:
    return Config.fromfile(repo / CONFIG)


def test_training_and_evaluation_share_no_scene(config: Config) -> None:
    train, val, test = (config[name].dataset for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'))
    assert val == test
    assert train.seed == val.seed
    assert val.start + val.num_images <= train.start


def test_the_head_fits_the_data_set(config: Config) -> None:
    assert config.model.bbox_head.num_classes == len(CLASS_NAMES)
    train = config.train_dataloader.dataset
    scenes = [draw_scene(train.seed, train.start + i, train.image_size) for i in range(300)]
    sides = np.concatenate([scene.bboxes[:, 2:] - scene.bboxes[:, :2] for scene in scenes])
    anchors = np.array(config.model.bbox_head.anchors).reshape(-1, 2)
    ratios = sides[:, None] / anchors
    worst = np.maximum(ratios, 1 / ratios).max(axis=2).min(axis=1)
    assert worst.max() < 4, 'YOLOv5 assigns a box to anchors within a factor of four'
    assert np.median(worst) < 1.3


def test_it_learns_under_mmdet_train_and_its_weights_can_be_exported(repo: Path, tmp_path: Path) -> None:
    """Twenty-four steps on sixteen scenes, evaluation, checkpoint."""
    options = {
        'train_dataloader.batch_size': 8,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.dataset.num_images': 16,
        'train_dataloader.dataset.image_size': 128,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'val_dataloader.dataset.num_images': 4,
        'train_cfg.max_epochs': 12,
        'train_cfg.val_interval': 12,
        'default_hooks.checkpoint.interval': 12,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'param_scheduler.0.end': 4,
        'param_scheduler.1.T_max': 12,
        'param_scheduler.1.end': 12,
    }
    train = Path(mmdet.__file__).parent / '.mim/tools/train.py'
    command = [sys.executable, str(train), str(repo / CONFIG), '--work-dir', 'run']
    command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    paths = [str(repo), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [record['loss_bbox'] for record in records if 'loss_bbox' in record]
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.92 * np.mean(losses[:4])
    assert any('coco/bbox_mAP' in record for record in records)

    checkpoint = load_from_local(str(tmp_path / 'run/epoch_12.pth'))
    assert checkpoint['meta']['dataset_meta']['classes'] == CLASS_NAMES
    assert ShapesDataset.METAINFO['classes'] == CLASS_NAMES
    weights = sum(t.numel() * t.element_size() for t in checkpoint['state_dict'].values())
    assert weights < 1.9e6, 'the file that ships must stay under 2 MB'
