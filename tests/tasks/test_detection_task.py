# SPDX-License-Identifier: Apache-2.0
"""The general task with tiny versions of MMDetection's detectors, most of them with instance masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmzsq.config.compose import has_masks
from mmzsq.masks import ellipse_masks, mask_boxes
from mmzsq.models.train_eval_modes import frozen_train_mode
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.tasks import DetectionTask, build_detection_task
from mmzsq.tasks.detection_task import add_ignored_semantic_labels, needs_masks, sum_losses

SIZE = (64, 96)
CLASSES = 3
SMALL_RESNET = dict(depth=18, base_channels=8, frozen_stages=-1, init_cfg=None)
ONE_STAGE: dict[str, tuple[str, dict[str, Any]]] = {
    'solov2': (
        'solov2/solov2_r50_fpn_1x_coco.py',
        {
            'model.backbone': SMALL_RESNET,
            'model.neck.in_channels': [8, 16, 32, 64],
            'model.mask_head': dict(feat_channels=32, stacked_convs=1),
        },
    ),
    'condinst': (
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        {'model.backbone': SMALL_RESNET, 'model.neck.in_channels': [8, 16, 32, 64]},
    ),
    'rtmdet-ins': ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', {'model.backbone.init_cfg': None}),
}
"""MMDetection's config and the overrides that make it small, for one-stage detectors with masks, by name."""


@pytest.fixture(scope='module')
def tiny(tiny_cfg: Callable[[str], Any]) -> Callable[..., Any]:
    """Function that returns the config of a tiny detector with three classes and at most 20 predictions."""
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'

    def tiny(name: str, score_thr: float = 0.0) -> Any:
        if name in ONE_STAGE:
            path, changes = ONE_STAGE[name]
            cfg = Config.fromfile(configs / path)
            cfg.merge_from_dict(copy.deepcopy(changes))
            model = cfg.model
        else:
            model = tiny_cfg(name)
        _replace(model, dict(num_classes=CLASSES, score_thr=score_thr, filter_thr=score_thr, max_per_img=20))
        return model

    return tiny


def _replace(cfg: Any, values: dict[str, Any]) -> None:
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key in values:
                cfg[key] = values[key]
            _replace(value, values)
    elif isinstance(cfg, list):
        for item in cfg:
            _replace(item, values)


@pytest.fixture
def build(tiny: Callable[..., Any]) -> Callable[..., nn.Module]:
    """Function that builds a tiny detector with random weights by name."""
    return lambda name, **options: MODELS.build(tiny(name, **options))


def labels() -> list[InstanceData]:
    """Return the labels of two images, with two objects and one object."""
    bboxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [30.0, 20.0, 90.0, 60.0]])
    both = InstanceData(bboxes=bboxes, labels=torch.tensor([0, 2]), masks=ellipse_masks(bboxes, SIZE))
    return [both, both[:1]]


@pytest.mark.parametrize(
    ('name', 'needed'),
    [('mask-rcnn_r18', True), ('condinst', True), ('solov2', True), ('rtmdet-ins', True), ('faster-rcnn_r18', False)],
)
def test_a_detector_that_needs_masks_predicts_them_at_image_size(
    build: Any, tiny: Any, name: str, needed: bool
) -> None:
    detector = build(name)
    # Config and detector agree.
    assert needs_masks(detector) == has_masks(tiny(name)) == needed
    task = DetectionTask(detector)
    # 60 x 90 is not a multiple of most strides.
    for size in [SIZE] if name == 'solov2' else [SIZE, (60, 90)]:
        for found in task.predict(torch.rand(2, 3, *size)):
            assert set(found.keys()) == {'bboxes', 'scores', 'labels', *(['masks'] if needed else [])}
            if needed:
                assert found.masks.shape == (len(found), *size)
                assert (found.masks.dtype, found.masks.device.type) == (torch.bool, 'cpu')


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'rtmdet-ins', 'solov2'])
def test_an_image_without_detections_has_zero_masks_of_image_size(build: Any, name: str) -> None:
    task = DetectionTask(build(name, score_thr=0.999))
    for found in task.predict(torch.rand(2, 3, *SIZE)):
        assert len(found) == 0
        assert found.masks.shape == (0, *SIZE)
        assert found.masks.dtype == torch.bool
        assert found.bboxes.shape == (0, 4)


def test_boxes_of_a_detector_without_a_box_head_bound_its_masks(build: Any) -> None:
    [found] = DetectionTask(build('solov2')).predict(torch.rand(1, 3, *SIZE))
    assert len(found) > 0
    assert found.masks.any()
    torch.testing.assert_close(found.bboxes, mask_boxes(found.masks))


def test_label_masks_become_bitmap_masks(build: Any) -> None:
    samples = DetectionTask(build('mask-rcnn_r18')).data_samples(labels(), SIZE)
    for sample, instances in zip(samples, labels(), strict=True):
        masks = sample.gt_instances.masks
        assert isinstance(masks, BitmapMasks)
        assert (masks.height, masks.width, masks.masks.dtype) == (*SIZE, np.uint8)
        np.testing.assert_array_equal(masks.masks, instances.masks.numpy())


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'rtmdet-ins'])
def test_the_loss_depends_on_masks_and_leaves_the_samples_unchanged(build: Any, name: str) -> None:
    detector = build(name)
    task = DetectionTask(detector)
    images = torch.rand(2, 3, *SIZE)

    def mask_loss(samples: Any) -> float:
        terms: dict[str, Any] = {}
        loss = task.detector.loss
        task.detector.loss = lambda *args: terms.update(loss(*args)) or terms
        torch.manual_seed(1)
        task.loss(images, samples)
        task.detector.loss = loss
        return float(terms['loss_mask'])

    samples = task.data_samples(labels(), SIZE)
    first = mask_loss(samples)
    assert mask_loss(samples) == first > 0
    others = labels()
    for instances in others:
        instances.masks = ~instances.masks
    assert mask_loss(task.data_samples(others, SIZE)) != pytest.approx(first, rel=1e-4)


def test_the_loss_does_not_depend_on_other_processes(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, this head averages the number of objects over all processes."""
    task = DetectionTask(build('condinst'))
    images, samples = torch.rand(2, 3, *SIZE), task.data_samples(labels(), SIZE)
    torch.manual_seed(1)
    alone = task.loss(images, samples)
    for name, value in (('is_initialized', True), ('get_world_size', 2), ('get_rank', 0)):
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    exchanged = []
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda *_, **__: exchanged.append(1))
    torch.manual_seed(1)
    assert torch.equal(task.loss(images, samples), alone) and not exchanged
    # Training still communicates.
    assert torch.distributed.is_initialized()
    with frozen_train_mode(task.detector):
        task.detector.loss(task.normalize(images), samples)
    assert exchanged


class Sees(nn.Module):
    """A mask detector that predicts the same confident object in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.data_preprocessor = nn.Module()
        self.mask_head = Config(dict(num_classes=CLASSES))
        self.with_mask, self.with_bbox = True, True
        self.masks_seen: list[torch.Tensor] = []

    def loss(self, inputs: torch.Tensor, samples: list[Any]) -> dict[str, torch.Tensor]:
        self.masks_seen = [torch.from_numpy(sample.gt_instances.masks.masks).bool() for sample in samples]
        return dict(loss=self.scale * inputs.square().mean())

    def predict(self, inputs: torch.Tensor, samples: list[Any], rescale: bool) -> list[Any]:
        height, width = inputs.shape[2:]
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        # The left half of its box, which differs from an ellipse.
        masks[0, : height // 4, : width // 8] = True
        for sample in samples:
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[0.0, 0.0, width / 4, height / 4]]),
                scores=torch.tensor([0.9]),
                labels=torch.tensor([1]),
                masks=masks,
            )
        return samples


SYNTHESIS = dict(
    relabel=dict(image_size=(32, 64), iterations=2), synthesize=dict(image_size=(64, 128), iterations=2), priors=[]
)


def test_initial_boxes_get_ellipses_and_predictions_keep_their_masks() -> None:
    detector = Sees()
    sampler = dict(
        type='mmzsq.AdaptiveLabelSampler',
        start=dict(type='mmzsq.MultiBoxSampler', num_boxes=(1, 1), side=(0.7, 0.7)),
        warmup=1,
        interval=1,
    )
    made = CalibrationSetGenerator(DetectionTask(detector), SYNTHESIS, sampler, batch_size=2, seed=0)
    _, found, info = made.make_shard(0, 2)
    assert info['relabel']['added'] == 2
    for instances, seen in zip(found, detector.masks_seen, strict=True):
        assert instances.masks.shape == (2, 64, 128)
        # The loss gets the masks of the calibration set.
        assert torch.equal(seen, instances.masks)
        ellipse = ellipse_masks(instances.bboxes[:1], (64, 128))
        assert (ellipse ^ instances.masks[:1]).sum() < 0.05 * ellipse.sum()
        predicted = torch.zeros(64, 128, dtype=torch.bool)
        predicted[:16, :16] = True
        # Interpolation changes pixels at the corner.
        assert (predicted ^ instances.masks[1]).sum() <= 3


def test_masks_of_a_sampler_are_dropped_for_a_detector_without_masks(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Sees()
    detector.with_mask = False
    detector.loss = lambda inputs, samples: dict(loss=inputs.mean() * ('masks' not in samples[0].gt_instances))
    made = CalibrationSetGenerator(
        DetectionTask(detector), SYNTHESIS, dict(type='mmzsq.SingleBoxSampler'), batch_size=2, seed=0
    )
    sample = made.sampler.sample

    def with_masks(count: int, size: Any, *args: Any) -> list[InstanceData]:
        drawn = sample(count, size, *args)
        for instances in drawn:
            instances.masks = ellipse_masks(instances.bboxes, size)
        return drawn

    monkeypatch.setattr(made.sampler, 'sample', with_masks)
    _, found, _ = made.make_shard(0, 2)
    assert all('masks' not in instances for instances in found)


def test_a_semantic_branch_without_labels_adds_nothing_to_the_loss(build: Any) -> None:
    """The other terms equal those with semantic labels that ignore every pixel."""
    task = build_detection_task(build('htc_r18'))
    assert type(task) is DetectionTask
    assert 'semantic branch adds nothing' in str(task.note)
    samples = task.data_samples(labels(), SIZE)
    images = torch.rand(2, 3, *SIZE, requires_grad=True)
    torch.manual_seed(2)
    loss = task.loss(images, samples)
    for sample in samples:
        assert 'gt_sem_seg' not in sample
        sample.gt_sem_seg = PixelData(sem_seg=torch.full((1, *SIZE), 255))
    torch.manual_seed(2)
    losses = task.detector.train().loss(task.normalize(images), samples)
    assert losses.pop('loss_semantic_seg') == 0
    torch.testing.assert_close(loss, sum_losses(losses))
    assert torch.autograd.grad(loss, images)[0].abs().sum() > 0


def test_existing_semantic_labels_are_kept(build: Any) -> None:
    samples = DetectionTask(build('htc_r18')).data_samples(labels(), SIZE)
    known = torch.ones(1, *SIZE, dtype=torch.long)
    samples[0].gt_sem_seg = PixelData(sem_seg=known)
    add_ignored_semantic_labels(build('htc_r18'), samples)
    assert samples[0].gt_sem_seg.sem_seg is known
    assert samples[1].gt_sem_seg.sem_seg.unique().tolist() == [255]
