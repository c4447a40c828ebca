# SPDX-License-Identifier: Apache-2.0
"""The last step of ``make demo``, on a student that is calibrated but not trained."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq import export
from mmzsq.config import compose
from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.registry import MODELS


@pytest.fixture
def work_dir(repo: Path, tmp_path: Path) -> Path:
    """Folder as training leaves it: a checkpoint, its name, and images."""
    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')
    cfg.work_dir = str(tmp_path)
    model: Any = MODELS.build(compose(cfg).model)
    model.init_weights()
    scenes = [draw_scene(2, index).image for index in range(2)]
    samples = [DetDataSample(metainfo=dict(img_shape=(256, 256), ori_shape=(256, 256))) for _ in scenes]
    inputs = [torch.from_numpy(scene.transpose(2, 0, 1).copy()) for scene in scenes]
    model.initialize_quantizers([dict(inputs=inputs, data_samples=samples)])
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    (tmp_path / 'calibration_set/images').mkdir(parents=True)
    for index, scene in enumerate(scenes):
        cv2.imwrite(str(tmp_path / f'calibration_set/images/{index:06d}.png'), scene)
    return tmp_path


def test_the_demo_ends_with_a_verified_file_and_its_speed(
    repo: Path, work_dir: Path, unformatted_configs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    makefile = (repo / 'Makefile').read_text().replace('\\\n', ' ')
    command = re.search(r'-m mmzsq\.export (.*?);', makefile)[1]  # type: ignore[index]
    folder = 'work_dirs/demo'
    checkpoint = f'"$$(cat {folder}/last_checkpoint)"'
    assert checkpoint in command
    words = command.replace(checkpoint, str(work_dir / 'epoch_1.pth')).replace(folder, str(work_dir)).split()
    monkeypatch.chdir(repo)
    monkeypatch.setattr(importlib.import_module('mmzsq.deploy.latency'), 'PAIRS', 5)
    export.main(words)
    entry = json.loads((work_dir / 'deploy.json').read_text())['models']['student.onnx']
    assert entry['runtimes'].keys() == {'onnxruntime', 'openvino'}
    assert all(checks['passed'] for checks in entry['runtimes'].values())
    assert entry['speed']['runtime'] == 'openvino'
    assert entry['speed']['pairs'] == 5
    sizes = [(work_dir / f'{name}.onnx').stat().st_size for name in ('student', 'student.float')]
    assert sizes[0] < sizes[1] / 2
