# SPDX-License-Identifier: Apache-2.0
"""A user's folder with pure-Python configs: a small detector in the style of MMDetection's own, and a leaf."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

DETECTORS = Path(__file__).parent / 'config' / 'pure_python'
SHRUNK = dict(
    faster_rcnn="""
model.backbone.update(dict(depth=18, base_channels=8, init_cfg=None))
model.neck.update(dict(in_channels=[8, 16, 32, 64], out_channels=16))
model.rpn_head.update(dict(in_channels=16, feat_channels=16))
model.roi_head.bbox_roi_extractor.update(dict(out_channels=16))
model.roi_head.bbox_head.update(dict(in_channels=16, fc_out_channels=32, num_classes=2))
""",
    rtmdet="""
model.backbone.update(dict(widen_factor=0.125))
model.neck.update(dict(in_channels=[32, 64, 128], out_channels=16))
model.bbox_head.update(dict(in_channels=16, feat_channels=16, num_classes=2))
val_dataloader.dataset.pipeline[2].size = (64, 64)
""",
)
DETECTOR = """
from mmengine.config import read_base

with read_base():
    from .{name} import *
{changes}
val_dataloader.update(dict(num_workers=0, persistent_workers=False))
val_dataloader.dataset.update(dict(
    data_root='', ann_file='ann.json', data_prefix=dict(img='images/'), metainfo=dict(classes=('cat', 'dog'))
))
val_dataloader.dataset.pipeline[1].scale = (64, 64)
test_dataloader = val_dataloader
val_evaluator.update(dict(ann_file='ann.json'))
test_evaluator = val_evaluator
"""
LEAF = """
from mmengine.config import read_base
from mmzsq.synthesis import TotalVariationPrior

with read_base():
    from .tiny_{name} import *
    from mmzsq.configs.zsq_w4a8 import *

load_from = 'teacher.pth'
zsq.merge(dict(
    calibration_set=dict(num_images=2, batch_size=2),
    label_sampler=dict(warmup=1, interval=1),
    synthesis=dict(
        relabel=dict(image_size=64, iterations=1, batch_size=2),
        synthesize=dict(image_size=64, iterations=1, batch_size=2),
        refine=None,
        priors=[dict(type=TotalVariationPrior, weight=0.1)],
        require_feature_prior=False,
    ),
    train=dict(max_epochs=1, batch_size=2, num_workers=0, init_batches=1),
))
"""


def make_project(folder: Path, name: str) -> Path:
    """Write the configs, a teacher with random weights and two evaluation images of noise.

    Returns:
        Path of the leaf, which calls the detector ``tiny_<name>``.
    """
    shutil.copytree(DETECTORS, folder, dirs_exist_ok=True)
    (folder / f'tiny_{name}.py').write_text(DETECTOR.format(name=name, changes=SHRUNK[name]))
    (folder / 'leaf.py').write_text(LEAF.format(name=name))
    detector = MODELS.build(Config.fromfile(folder / f'tiny_{name}.py').model)
    torch.save({'state_dict': detector.state_dict()}, folder / 'teacher.pth')
    boxes = [dict(id=i + 1, image_id=i, category_id=1, bbox=[8, 8, 32, 32], area=1024, iscrowd=0) for i in range(2)]
    images = [dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(2)]
    categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
    (folder / 'ann.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))
    (folder / 'images').mkdir()
    for image in images:
        noise = np.random.default_rng(image['id']).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / 'images' / image['file_name']), noise)
    return folder / 'leaf.py'
