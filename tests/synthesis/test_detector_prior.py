# SPDX-License-Identifier: Apache-2.0
"""Labels whose categories and sizes follow a detector's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from scipy import stats
from torch import nn

from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.converters.yolov5 import convert_yolov5
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.synthesis.label_samplers import AdaptiveLabelSampler, DetectorPriorSampler, LabelPrior
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.label_prior import label_prior

SIZE = (320, 640)
PRIOR = LabelPrior(torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([[32.0, 64.0], [128.0, 32.0]]))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(prior: LabelPrior, image_size: tuple[int, int] = SIZE, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and categories of 2000 images."""
    sampler = DetectorPriorSampler(**options)
    sampler.set_label_prior(prior, SIZE)
    labels = sampler.sample(2000, image_size, 4, seeded())
    return torch.cat([image.bboxes for image in labels]), torch.cat([image.labels for image in labels])


def test_categories_follow_the_label_prior() -> None:
    _, categories = drawn(PRIOR)
    found = torch.bincount(categories, minlength=4) / len(categories)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.02, rtol=0)


def test_box_sizes_are_anchor_sizes_scaled_to_the_image() -> None:
    boxes, _ = drawn(PRIOR, spread=0.0)
    sizes = {tuple(round(side) for side in size) for size in (boxes[:, 2:] - boxes[:, :2]).tolist()}
    assert sizes == {(32, 64), (128, 32)}
    assert (boxes >= 0).all() and (boxes <= torch.tensor([640, 320, 640, 320]) + 1e-3).all()
    half, _ = drawn(PRIOR, (160, 320), spread=0.0)
    torch.testing.assert_close(half, boxes / 2)


def test_sizes_spread_about_the_anchors() -> None:
    boxes, _ = drawn(LabelPrior(None, torch.tensor([[64.0, 32.0]])), spread=0.5)
    width, height = (boxes[:, 2:] - boxes[:, :2]).log().unbind(1)
    for side, anchor in ((width, 64), (height, 32)):
        assert side.mean().item() == pytest.approx(np.log(anchor), abs=0.02)
        assert side.std().item() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack((width, height)))[0, 1]) < 0.05


def test_without_prior_statistics_labels_are_uniform() -> None:
    boxes, categories = drawn(LabelPrior(None, None), side=(0.1, 0.2))
    found = torch.bincount(categories, minlength=4) / len(categories)
    torch.testing.assert_close(found, torch.full((4,), 0.25), atol=0.02, rtol=0)
    share = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([640, 320])
    assert share.min() >= 0.1 - 1e-6 and share.max() <= 0.2 + 1e-6


def test_sampling_without_a_label_prior_is_an_error() -> None:
    with pytest.raises(UserError, match='call set_label_prior'):
        DetectorPriorSampler().sample(1, SIZE, 4, seeded())
    with pytest.raises(UserError, match=r'spread must be a number in \[0, 10\], got -1'):
        DetectorPriorSampler(spread=-1)


def test_adaptive_sampling_may_start_from_it() -> None:
    sampler = AdaptiveLabelSampler(start=dict(type='mmzsq.DetectorPriorSampler', num_boxes=(3, 3)))
    assert sampler.uses_detector_prior and not AdaptiveLabelSampler().uses_detector_prior
    sampler.set_label_prior(PRIOR, SIZE)
    (image,) = sampler.sample(1, SIZE, 4, seeded())
    assert len(image) == 3


DETECTORS = {
    'retinanet/retinanet_r50_fpn_1x_coco.py': ('bbox_head.retina_cls', 9, 'sigmoid'),
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': ('roi_head.bbox_head.fc_cls', 1, 'softmax'),
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': ('roi_head.bbox_head.2.fc_cls', 1, 'softmax'),
    'ssd/ssd300_coco.py': ('bbox_head.cls_convs.0.0', 4, 'softmax'),
}


@pytest.mark.parametrize('config', DETECTORS)
def test_categories_are_read_from_the_biases_of_mmdetections_heads(config: str) -> None:
    register_all_modules()
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / config).model
    cfg.backbone.init_cfg = None
    detector = MODELS.build(cfg)
    name, anchors, kind = DETECTORS[config]
    for other, layer in detector.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None and 'cls' in other:
            nn.init.constant_(layer.bias, -20.0)
    bias = detector.get_submodule(name).bias.data
    outputs = len(bias) // anchors
    logits = torch.full((anchors, outputs), -4.0)
    logits[:, 7] = 1.0
    logits[0, 9] = 0.0
    bias.copy_(logits.flatten())
    prior = label_prior(detector, 80)
    assert prior.sizes is None
    assert prior.categories.shape == (80,)
    assert prior.categories.argsort(descending=True)[:2].tolist() == [7, 9]
    if kind == 'softmax' and anchors == 1:
        torch.testing.assert_close(prior.categories, logits.softmax(1)[0, :80])
    if kind == 'sigmoid':
        torch.testing.assert_close(prior.categories, logits.sigmoid().mean(0))


@pytest.mark.parametrize('num_classes', [2, 8, 256])
def test_hidden_layers_are_not_read_as_categories(num_classes: int) -> None:
    """The hidden layers of this head have 256 outputs, which are divisible by 2 and 8."""
    register_all_modules()
    config = 'retinanet/retinanet_r50_fpn_1x_coco.py'
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / config).model
    cfg.backbone.update(init_cfg=None, depth=18)
    cfg.neck.in_channels = [64, 128, 256, 512]
    cfg.bbox_head.update(num_classes=num_classes)
    if num_classes == 256:
        cfg.bbox_head.anchor_generator.update(octave_base_scale=4, scales_per_octave=1, ratios=[1.0])
    detector = MODELS.build(cfg)
    logits = torch.linspace(-4, 2, num_classes)
    head = detector.bbox_head
    head.retina_cls.bias.data.copy_(logits.repeat(head.num_base_priors))
    torch.testing.assert_close(label_prior(detector, num_classes).categories, logits.sigmoid())


def test_a_set_starts_from_the_label_prior_of_its_detector(repo: Path) -> None:
    register_all_modules()
    detector = MODELS.build(Config.fromfile(repo / 'configs/yolov5/yolov5-n_coco.py').model)
    for conv in detector.bbox_head.convs:
        outputs = conv.bias.data.view(3, 85)
        outputs[:, 5:] = -9.0
        outputs[:, 5 + 41] = 2.0
    generator = CalibrationSetGenerator(
        build_detection_task(detector),
        dict(
            relabel=None, synthesize=dict(image_size=640, iterations=1), priors=[dict(type='mmzsq.BNStatisticsPrior')]
        ),
        dict(type='mmzsq.DetectorPriorSampler', spread=0.0),
        batch_size=1,
        seed=0,
    )
    labels = generator.sampler.sample(100, (640, 640), 80, seeded())
    categories = torch.cat([image.labels for image in labels])
    assert (categories == 41).float().mean() > 0.9
    anchors = {tuple(anchor) for anchor in detector.bbox_head.anchors.flatten(0, 1).tolist()}
    sides = torch.cat([image.bboxes[:, 2:] - image.bboxes[:, :2] for image in labels])
    assert {tuple(round(side) for side in size) for size in sides.tolist()} == {tuple(map(int, a)) for a in anchors}


def test_the_biases_of_a_real_detector_hold_the_categories_of_its_data(shared: Path, repo: Path) -> None:
    register_all_modules()
    detector = MODELS.build(Config.fromfile(repo / 'configs/yolov5/yolov5-n_coco.py').model)
    converted = convert_yolov5(read_ultralytics(shared / 'weights' / 'yolov5n.pt').tensors)
    detector.load_state_dict(converted.state_dict)
    prior = label_prior(detector, 80)
    real = json.loads((shared / 'data/coco_mini/annotations/instances_train2017.json').read_text())
    ids = sorted(category['id'] for category in real['categories'])
    counts = np.bincount([ids.index(box['category_id']) for box in real['annotations']], minlength=80)
    weights = prior.categories.numpy()
    assert np.corrcoef(weights, counts)[0, 1] > 0.9
    assert stats.spearmanr(weights, counts).statistic > 0.6
