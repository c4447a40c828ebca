# SPDX-License-Identifier: Apache-2.0
"""Backbone and neck of each size equal Ultralytics', if the package ``ultralytics`` is installed.

The package has YOLOv5's layers up to the head. Its head, without anchors, and its loss are those of later detectors:
ours are compared with the plain implementations in this folder instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmzsq.converters.yolov5 import SIZES, convert_yolov5


@pytest.fixture(scope='module')
def detection_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ultralytics' class. Its settings file is written to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('YOLO_CONFIG_DIR', str(tmp_path_factory.mktemp('settings')))
        return pytest.importorskip('ultralytics.nn.tasks').DetectionModel


def randomize(model: nn.Module) -> None:
    """Set BatchNorm layers to random parameters and to statistics close to those of random images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
        norm.reset_running_stats()
    model.train()(torch.rand(8, 3, 64, 96))
    for norm in norms:
        norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    model.eval()


@pytest.mark.parametrize('size', list(SIZES))
def test_features_are_the_same(plain: Any, detection_model: Any, repo: Path, size: str) -> None:
    upstream = detection_model(f'yolov5{size}.yaml', verbose=False)
    with torch.no_grad():
        randomize(upstream)
    register_all_modules()
    detector = MODELS.build(Config.fromfile(repo / f'configs/yolov5/yolov5-{size}_coco.py').model).eval()
    trunk = {name: tensor for name, tensor in upstream.state_dict().items() if not name.startswith('model.24.')}
    head = {f'model.24.{n.replace("convs", "m")}': t for n, t in detector.bbox_head.state_dict().items()}
    head['model.24.anchors'] /= torch.tensor(plain.strides).view(-1, 1, 1)
    converted = convert_yolov5({**trunk, **head})
    assert converted.size == size
    detector.load_state_dict(converted.state_dict)

    seen: list[Any] = []
    upstream.model[24].register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        upstream(images)
        features = detector.extract_feat(images)
    for level, expected in zip(features, seen, strict=True):
        assert (level - expected).abs().max() < 1e-4 * expected.abs().max()
        assert expected.std() > 0.1
