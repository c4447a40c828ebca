# SPDX-License-Identifier: Apache-2.0
"""Whole runs outside the source tree: with MMDetection's own tools, and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS

LEAF = """
_base_ = ['{configs}/shapes/yolov5-p_shapes.py', __import__('mmzsq.base').base.path('w4a8')]
load_from = 'teacher.pth'
zsq = dict(
    calibration_set=dict(num_images=4, batch_size=2),
    label_sampler=dict(warmup=1, interval=1),
    synthesis=dict(
        relabel=dict(image_size=64, iterations=2, batch_size=2),
        synthesize=dict(image_size=64, iterations=2, batch_size=2),
        refine=None,
    ),
    train=dict(max_epochs=1, batch_size=2, num_workers=0, init_batches=1),
)
test_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(num_images=4)
)
val_dataloader = test_dataloader
"""


@pytest.fixture
def folder(tmp_path: Path, installed: Path) -> Path:
    """A user's folder: a leaf over installed bases, and a teacher with random weights."""
    configs = installed / 'mmzsq' / '.mim' / 'configs'
    (tmp_path / 'leaf.py').write_text(LEAF.format(configs=configs))
    register_all_modules()
    teacher = MODELS.build(Config.fromfile(configs / 'shapes' / 'yolov5-p_shapes.py').model)
    teacher.init_weights()
    torch.save({'state_dict': teacher.state_dict()}, tmp_path / 'teacher.pth')
    return tmp_path


def run(folder: Path, installed: Path, *command: str | Path) -> None:
    env = dict(os.environ, PYTHONPATH=str(installed), OMP_NUM_THREADS='1', PORT='29653')
    # The launch scripts call `python`.
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def calibration_images(work_dir: Path) -> dict[str, bytes]:
    images = (work_dir / 'calibration_set' / 'images').glob('*.png')
    return {path.name: path.read_bytes() for path in images}


def test_a_leaf_trains_by_mmdetections_own_tool(folder: Path, installed: Path) -> None:
    stock = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    run(folder, installed, sys.executable, stock, 'leaf.py', '--work-dir', 'out')
    assert len(calibration_images(folder / 'out')) == 4
    # The checkpoint stands alone. MMDetection's own test.py imports mmcv.ops before any config, so
    # it needs a compiled mmcv; ours does not.
    (folder / 'teacher.pth').unlink()
    checkpoint = (folder / 'out' / 'last_checkpoint').read_text()
    test = ('-m', 'mmzsq.test', 'leaf.py', checkpoint, '--work-dir', 'tested')
    run(folder, installed, sys.executable, *test)
    [scores] = (folder / 'tested').rglob('*.json')
    assert 'coco/bbox_mAP' in json.loads(scores.read_text())


def test_two_processes_make_the_set_that_one_makes(folder: Path, installed: Path) -> None:
    tools = installed / 'mmzsq' / '.mim' / 'tools'
    run(folder, installed, sys.executable, tools / 'generate.py', 'leaf.py', '--work-dir', 'one')
    run(folder, installed, 'bash', tools / 'dist_train.sh', 'leaf.py', '2', '--work-dir', 'two')
    assert calibration_images(folder / 'one') == calibration_images(folder / 'two')
    assert len(calibration_images(folder / 'two')) == 4
    assert (folder / 'two' / 'last_checkpoint').is_file()
