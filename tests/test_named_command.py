# SPDX-License-Identifier: Apache-2.0
"""``tools/train.py configs/zsq/mask-rcnn_swin-t_w4a8.py``, the command that the project is known by, as a user runs it.

The teacher is MMDetection's own model with random weights, saved as MMDetection saves it; the images to evaluate on are
real. Nothing can be downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

STOCK = Path(mmdet.__file__).parent / '.mim/configs/swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
LEAF = 'configs/zsq/mask-rcnn_swin-t_w4a8.py'
FEW = (
    *('zsq.calibration_set.num_images=1', 'zsq.label_sampler.warmup=1', 'zsq.label_sampler.interval=1'),
    *('zsq.synthesis.relabel.image_size=64', 'zsq.synthesis.relabel.iterations=2'),
    *('zsq.synthesis.synthesize.image_size=64', 'zsq.synthesis.synthesize.iterations=1'),
    *('zsq.train.max_epochs=1', 'zsq.train.batch_size=1', 'zsq.train.init_batches=1', 'zsq.train.num_workers=0'),
    *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
    'val_dataloader.dataset.pipeline.1.scale=(96,96)',
)
SMALLER = (
    *('model.backbone.embed_dims=24', 'model.backbone.depths=[1,1,1,1]', 'model.neck.in_channels=[24,48,96,192]'),
    'model.roi_head.bbox_head.fc_out_channels=64',
)
CELLS = ('RBC', 'WBC', 'Platelets')

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(repo: Path, tmp_path: Path) -> Command:
    """Run the command in a folder of its own, without a network."""
    nowhere = 'http://127.0.0.1:9'
    env = dict(os.environ, OMP_NUM_THREADS='1', TORCH_HOME=str(tmp_path / 'cache'), PYTHONPATH=str(repo))
    env |= dict(http_proxy=nowhere, https_proxy=nowhere, no_proxy='')

    def command(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, repo / 'tools/train.py', repo / LEAF, '--work-dir', 'out', '--cfg-options', *options],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return command


def save_teacher(path: Path, classes: tuple[str, ...], *changes: str) -> None:
    """Random weights that detect the first class everywhere, because AP without any detection is NaN."""
    register_all_modules()
    cfg = Config.fromfile(STOCK)
    cfg.merge_from_dict(options_of(changes))
    teacher = MODELS.build(cfg.model)
    teacher.roi_head.bbox_head.fc_cls.bias.data[0] = 5
    torch.save(dict(state_dict=teacher.state_dict(), meta=dict(dataset_meta=dict(classes=classes))), path)


def options_of(changes: tuple[str, ...]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in (change.split('=') for change in changes)}


def check_results(folder: Path, images: int) -> dict[str, Any]:
    """All three rows have box and mask AP, and the set has masks, without a download."""
    results = json.loads((folder / 'out' / 'results.json').read_text())
    assert results['evaluation_images'] == images
    assert set(results['metrics']) == {'float', 'ptq', 'zero_shot'}
    for metrics in results['metrics'].values():
        assert all(0 <= metrics[name] <= 1 for name in ('coco/bbox_mAP', 'coco/segm_mAP'))
    made = json.loads((folder / 'out' / 'calibration_set' / 'annotations' / 'instances.json').read_text())
    assert made['annotations']
    assert all(annotation['segmentation']['counts'] for annotation in made['annotations'])
    assert not (folder / 'cache').exists()
    return results


def test_it_ends_with_box_and_mask_ap(command: Command, shared: Path, tmp_path: Path) -> None:
    data = shared / 'data' / 'coco_mini'
    annotations = json.loads((data / 'annotations' / 'instances_val2017_masks.json').read_text())
    annotations['images'] = annotations['images'][:2]
    kept = {image['id'] for image in annotations['images']}
    annotations['annotations'] = [entry for entry in annotations['annotations'] if entry['image_id'] in kept]
    (tmp_path / 'few.json').write_text(json.dumps(annotations))
    save_teacher(tmp_path / 'teacher.pth', DATASETS.get('CocoDataset').METAINFO['classes'])

    result = command(
        *FEW,
        'load_from=teacher.pth',
        f'val_dataloader.dataset.data_root={data}/',
        f'val_dataloader.dataset.ann_file={tmp_path / "few.json"}',
        f'val_evaluator.ann_file={tmp_path / "few.json"}',
    )

    assert result.returncode == 0, result.stderr[-3000:]
    assert 'coco/segm_mAP' in result.stdout.split('results in')[-1]
    results = check_results(tmp_path, images=2)
    assert results['quantizer']['w_bits'] == 4
    report = json.loads((tmp_path / 'out' / 'quantization_report.json').read_text())['layers']
    quantized = [layer for layer in report if 'weight' in layer]
    assert len(quantized) == 73
    # Swin's twelve tables of relative positions stay float: they are added, not multiplied.
    assert len(report) == 73 + 12


def test_it_accepts_other_data_and_a_teacher_of_three_classes(command: Command, shared: Path, tmp_path: Path) -> None:
    """Blood cells, selected by options only."""
    bccd = shared / 'data' / 'bccd'
    names = (bccd / 'ImageSets' / 'Main' / 'test.txt').read_text().split()[:1]
    images = [dict(id=0, file_name=f'{names[0]}.jpg', width=640, height=480)]
    corners = [100, 100, 300, 100, 300, 300, 100, 300]
    cell = dict(id=1, image_id=0, category_id=1, bbox=[100, 100, 200, 200], area=40000, iscrowd=0)
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CELLS)]
    truth = dict(images=images, annotations=[dict(cell, segmentation=[corners])], categories=categories)
    (tmp_path / 'cells.json').write_text(json.dumps(truth))
    three = ('model.roi_head.bbox_head.num_classes=3', 'model.roi_head.mask_head.num_classes=3')
    save_teacher(tmp_path / 'teacher.pth', CELLS, *SMALLER, *three)
    data = (
        f'val_dataloader.dataset.data_root={bccd}/',
        'val_dataloader.dataset.data_prefix.img=JPEGImages/',
        f'val_dataloader.dataset.ann_file={tmp_path / "cells.json"}',
        f'val_evaluator.ann_file={tmp_path / "cells.json"}',
    )
    classes = f'val_dataloader.dataset.metainfo.classes={list(CELLS)}'

    result = command(*FEW, *SMALLER, *three, *data, classes, 'load_from=teacher.pth')

    assert result.returncode == 0, result.stderr[-3000:]
    results = check_results(tmp_path, images=1)
    assert set(results['calibration_set']['statistics']['classes']) == set(CELLS)


def test_without_network_and_teacher_the_message_names_the_file(command: Command, repo: Path) -> None:
    start = time.monotonic()
    result = command(*SMALLER)
    assert result.returncode == 2
    [message] = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert Config.fromfile(repo / LEAF).load_from in message
    assert '--cfg-options load_from=PATH' in message
    assert 'Traceback' not in result.stderr
    assert time.monotonic() - start < 120
