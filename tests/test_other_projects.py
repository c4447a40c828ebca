# SPDX-License-Identifier: Apache-2.0
"""Projects with a scope of their own run whole: one made here, and MMYOLO where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environments
import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, Registry, init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmzsq import train
from mmzsq.checkpoint import read_checkpoint
from mmzsq.qat.zero_shot_detector import _preprocess

SCOPE = 'other_project'
OTHER_MODELS = Registry('model', parent=MODELS, scope=SCOPE)
OTHER_TRANSFORMS = Registry('transform', parent=TRANSFORMS, scope=SCOPE)


class OtherTransform:
    """A transform for images with other annotations than a calibration set has."""

    def __init__(self, **options: Any) -> None:
        raise AssertionError(f'{type(self).__name__} of the other project reads no calibration set')


for name in ('LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackDetInputs'):
    OTHER_TRANSFORMS.register_module(name=name, module=type(name, (OtherTransform,), {}))


@OTHER_MODELS.register_module()
class OtherPreprocessor(DetDataPreprocessor):
    """As MMYOLO's: it wants batches with collated labels in training."""

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        if training:
            assert isinstance(data['data_samples'], dict)
        return super().forward(data, training)


@pytest.fixture(autouse=True)
def mmdetections_scope() -> Iterator[None]:
    """Leave MMDetection's scope to the tests that follow."""
    yield
    init_default_scope('mmdet')


def write_leaf(folder: Path, teacher: str, preprocessor: str) -> Path:
    """Write the config of a small detector of the other project, in three channels and 64 px."""
    leaf = folder / 'leaf.py'
    leaf.write_text(f"""
_base_ = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'mmzsq::_base_/zsq_w4a8.py']
default_scope = '{SCOPE}'
load_from = {teacher!r}
visualizer = dict(type='mmdet.DetLocalVisualizer')
default_hooks = dict(visualization=dict(type='mmdet.DetVisualizationHook'))
model = dict(
    _scope_='mmdet',
    data_preprocessor=dict(type={preprocessor!r}, pad_mask=False),
    backbone=dict(base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=8),
    bbox_head=dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1),
)
train_dataloader = dict(dataset=dict(metainfo=dict(classes=('nut', 'bolt', 'gear'))))
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
""")
    return leaf


def weights_after(folder: Path, teacher: Path, preprocessor: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder.mkdir()
    leaf = write_leaf(folder, str(teacher), preprocessor)
    options = [*environments.SMALL_RUN, 'zsq.train.image_size=96']
    monkeypatch.setattr(sys, 'argv', ['train', str(leaf), '--work-dir', str(folder / 'out'), '--cfg-options', *options])
    train.main()
    assert json.loads((folder / 'out' / 'results.json').read_text())['model_mb']
    return read_checkpoint(folder / 'out' / 'epoch_1.pth')['state_dict']


def test_a_project_with_its_own_transforms_and_preprocessor_trains_as_mmdetection_does(
    tmp_path: Path, unformatted_configs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config.fromfile(write_leaf(tmp_path, '', 'mmdet.DetDataPreprocessor'))
    teacher = tmp_path / 'teacher.pth'
    init_default_scope(SCOPE)
    torch.manual_seed(0)
    torch.save(dict(state_dict=MMDET_MODELS.build(cfg.model).state_dict()), teacher)
    own = weights_after(tmp_path / 'own', teacher, f'{SCOPE}.OtherPreprocessor', monkeypatch)
    stock = weights_after(tmp_path / 'stock', teacher, 'mmdet.DetDataPreprocessor', monkeypatch)
    assert own.keys() == stock.keys()
    assert all(torch.equal(value, stock[name]) for name, value in own.items())
    trained = torch.load(teacher, weights_only=True)['state_dict']
    assert not torch.equal(own['bbox_head.retina_cls.weight'], trained['bbox_head.retina_cls.weight'])


@pytest.mark.skipif(importlib.util.find_spec('mmyolo') is None, reason='mmyolo is not installed')
@pytest.mark.parametrize('base', environments.MMYOLO_DETECTORS)
def test_detectors_of_mmyolo_run_whole(base: str, repo: Path, tmp_path: Path) -> None:
    script = Path(environments.__file__)
    subprocess.run([sys.executable, script, '--inside', 'leaf', base, 'leaf.py'], cwd=tmp_path, check=True)
    command = [sys.executable, '-m', 'mmzsq.train', 'leaf.py', '--work-dir', 'out', '--cfg-options']
    subprocess.run([*command, *environments.SMALL_RUN], cwd=tmp_path, check=True, timeout=300)
    assert json.loads((tmp_path / 'out' / 'results.json').read_text())['model_mb']
    test = [sys.executable, '-m', 'mmzsq.test', 'leaf.py', 'out/epoch_1.pth']
    tested = subprocess.run(test, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    # COCO's annotations are not here.
    assert 'instances_val2017.json' in tested.stdout + tested.stderr


def test_batches_are_preprocessed_as_mmdetection_does_in_training() -> None:
    def batch() -> dict[str, Any]:
        samples = []
        for height, width in ((40, 64), (64, 33)):
            masks = BitmapMasks([np.ones((height, width), np.uint8)], height, width)
            sample = DetDataSample(metainfo=dict(img_shape=(height, width)))
            sample.gt_instances = InstanceData(masks=masks, bboxes=torch.zeros(1, 4))
            sample.gt_sem_seg = PixelData(sem_seg=torch.ones(1, height, width))
            samples.append(sample)
        images = [torch.full((3, *sample.img_shape), 100, dtype=torch.uint8) for sample in samples]
        return dict(inputs=images, data_samples=samples)

    preprocessor = DetDataPreprocessor(
        mean=[1, 2, 3], std=[4, 5, 6], pad_size_divisor=32, pad_mask=True, pad_seg=True, seg_pad_value=255
    )
    ours, stock = _preprocess(preprocessor, batch()), preprocessor(batch(), True)
    assert torch.equal(ours['inputs'], stock['inputs'])
    for mine, theirs in zip(ours['data_samples'], stock['data_samples'], strict=True):
        assert np.array_equal(mine.gt_instances.masks.masks, theirs.gt_instances.masks.masks)
        assert mine.gt_instances.masks.masks.shape == (1, 64, 64)
        assert torch.equal(mine.gt_sem_seg.sem_seg, theirs.gt_sem_seg.sem_seg)
        assert mine.batch_input_shape == theirs.batch_input_shape
