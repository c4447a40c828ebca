# SPDX-License-Identifier: Apache-2.0
"""Quantization on real images, as a comparison: a whole run of a tiny Mask R-CNN, whose report says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from mmzsq.engine import ZeroShotRunner
from mmzsq.qat.paired_forward import TwoStagePairedForward

SIZE = (48, 64)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images with two cells, without cells, with a cell and a crowd, and with a crowd; also for evaluation."""
    root = tmp_path / 'data'
    (root / 'JPEGImages').mkdir(parents=True)
    images, annotations = [], []
    for index, crowds in enumerate(([0, 0], [], [0, 1], [1])):
        pixels = np.random.default_rng(index).integers(0, 256, (*SIZE, 3), np.uint8)
        cv2.imwrite(str(root / 'JPEGImages' / f'{index}.png'), pixels)
        images.append(dict(id=index, file_name=f'{index}.png', height=SIZE[0], width=SIZE[1]))
        for place, crowd in enumerate(crowds):
            x, y, w, h = 4 + 28 * place, 6, 24, 30
            polygon = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
            box = dict(bbox=[x, y, w, h], segmentation=[polygon], area=w * h / 2, iscrowd=crowd, category_id=place)
            annotations.append(dict(id=len(annotations) + 1, image_id=index, **box))
    categories = [dict(id=index, name=name) for index, name in enumerate(('RBC', 'WBC', 'Platelets'))]
    (root / 'annotations').mkdir()
    for split in ('trainval', 'test'):
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture
def run(
    repo: Path, data: Path, tmp_path: Path, tiny_cfg: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ZeroShotRunner]:
    """Train by a config of blood cells with a tiny detector."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Config, 'pretty_text', property(lambda cfg: str(cfg.to_dict())))
    teacher = MODELS.build(tiny_cfg('mask-rcnn_r18'))
    teacher.init_weights()
    torch.save(dict(state_dict=teacher.state_dict()), 'teacher.pth')

    def run(kind: str) -> ZeroShotRunner:
        cfg = Config.fromfile(repo / f'configs/bccd/comparison/mask-rcnn_r50_bccd_w8a8_{kind}.py')
        cfg.pop('model')
        cfg.model = tiny_cfg('mask-rcnn_r18')
        loaders = ('val_dataloader', 'test_dataloader')
        quick = dict(batch_size=4, num_workers=0, persistent_workers=False)
        cfg.merge_from_dict(
            {
                'load_from': 'teacher.pth',
                'work_dir': kind,
                'zsq.calibration_set.real': dict(data_root=str(data), filter_cfg=None),
                'zsq.quantizer.weight.init': 'lsq',
                'zsq.quantizer.activation.init': 'lsq',
                'zsq.train': dict(max_epochs=1, batch_size=4, num_workers=0, init_batches=1),
                'val_evaluator.ann_file': str(data / 'annotations/test.json'),
                'test_evaluator.ann_file': str(data / 'annotations/test.json'),
                **{f'{loader}.{key}': value for loader in loaders for key, value in quick.items()},
                **{f'{loader}.dataset.data_root': str(data) for loader in loaders},
                **{f'{loader}.dataset.pipeline.1.scale': SIZE[::-1] for loader in loaders},
            }
        )
        cfg.launcher, cfg.experiment_name = 'none', f'{tmp_path.name}_{kind}'
        runner = ZeroShotRunner.from_cfg(cfg)
        runner.train()
        return runner

    return run


@pytest.mark.parametrize('kind', ['lsq-real', 'lsq-real-distil'])
def test_a_run_on_real_images_reports_box_and_mask_ap_and_its_data(
    run: Callable[..., ZeroShotRunner], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(logging.Logger, 'warning', lambda self, text, *args, **options: warned.append(text))
    told: list[str] = []
    monkeypatch.setattr(logging.Logger, 'info', lambda self, text, *args, **options: told.append(str(text)))
    compared: list[bool] = []
    compare = TwoStagePairedForward.__call__
    monkeypatch.setattr(
        TwoStagePairedForward, '__call__', lambda self, *args: compared.append(True) or compare(self, *args)
    )
    runner = run(kind)
    assert any('learns from real images, for comparison only' in text for text in warned)
    results = json.loads(Path(kind, 'results.json').read_text())
    # Images without cells, and crowds, are allowed.
    assert results['calibration_set'] == dict(statistics=dict(images=4, real=True), stages={})
    assert list(results['metrics']) == ['float', 'ptq', 'zero_shot']
    for row in results['metrics'].values():
        assert {'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP'} <= set(row)
    # The table at the end has both kinds of AP, and does not call this zero-shot.
    [table] = [text for text in told if 'results in' in text]
    assert all(name in table for name in ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'QAT on real images'))
    assert 'zero-shot' not in table and 'synthetic' not in table
    assert not Path(kind, 'calibration_set').exists()
    # The report has layers, measured on these images.
    assert not any('report lacks' in text for text in warned)
    layers = json.loads(Path(kind, 'report/details.json').read_text())['layers']
    assert any(len(layer.get('input', {}).get('counts', ())) for layer in layers)
    # Only distillation runs the teacher.
    assert bool(compared) == (kind == 'lsq-real-distil')
    before, after = runner.detector.teacher.state_dict(), runner.detector.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert any(name.startswith('roi_head.mask_head') for name in moved)
