# SPDX-License-Identifier: Apache-2.0
"""Every loss term equals MMDetection's for the same anchors and boxes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.task_modules import AssignResult, SamplingResult
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import nn
from torch.testing import assert_close

from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks import TwoStageTask
from mmzsq.tasks.detection_task import data_samples
from mmzsq.tasks.prediction_maps import flatten_maps
from mmzsq.tasks.two_stage import TwoStageSamples
from mmzsq.tasks.two_stage.anchors import rpn_loss
from mmzsq.tasks.two_stage.losses import bbox_loss, mask_loss, mask_targets
from mmzsq.tasks.two_stage.rois import RoIs

Build = Callable[..., nn.Module]
SIZE = (96, 128)


def begin(task: TwoStageTask, labels: list[InstanceData]) -> tuple[TwoStageSamples, tuple[Any, Any]]:
    """Return the samples after one call of the loss, and raw outputs of the first stage."""
    samples = task.data_samples(labels, SIZE)
    images = torch.rand(len(labels), 3, *SIZE)
    with torch.no_grad():
        task.loss(images, samples)
        return samples, task.detector.rpn_head(task.detector.extract_feat(task.normalize(images)))


def reference_rpn_loss(detector: Any, maps: tuple[Any, Any], labels: list[InstanceData]) -> torch.Tensor:
    samples = data_samples(labels, SIZE, torch.device('cpu'))
    for sample in samples:
        sample.gt_instances.labels.zero_()
    losses = detector.rpn_head.loss_by_feat(
        *maps, [sample.gt_instances for sample in samples], [sample.metainfo for sample in samples]
    )
    return sum(term for terms in losses.values() for term in terms)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(train_cfg__rpn__allowed_border=0, train_cfg__rpn__pos_weight=2.0),
        dict(rpn_head__loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=0.2, loss_weight=3.0)),
    ],
)
def test_the_first_stage_loss_is_mmdetections_if_all_anchors_are_sampled(
    build: Build, labels: list[InstanceData], changes: dict[str, Any]
) -> None:
    # 4-pixel anchors: some of them lie inside the small image.
    task = TwoStageTask(build(train_cfg__rpn__sampler__num=10**6, rpn_head__anchor_generator__scales=[4], **changes))
    samples, (scores, offsets) = begin(task, labels)
    assert samples.precomputed is not None
    logits, deltas = flatten_maps(scores, 1).squeeze(-1), flatten_maps(offsets, 4)
    assert samples.precomputed.anchors.positive.any(1).tolist() == [True, True, False, True]
    ours = rpn_loss(task.detector.rpn_head, logits, deltas, samples.precomputed.anchors)
    assert_close(ours, reference_rpn_loss(task.detector, (scores, offsets), labels))


def test_the_first_stage_samples_as_many_anchors_as_mmdetection(task: TwoStageTask, labels: list[InstanceData]) -> None:
    samples, (scores, offsets) = begin(task, labels)
    assert samples.precomputed is not None
    logits, deltas = flatten_maps(scores, 1).squeeze(-1), flatten_maps(offsets, 4)
    plan = samples.precomputed.anchors
    ours = torch.stack([rpn_loss(task.detector.rpn_head, logits, deltas, plan) for _ in range(60)])
    theirs = torch.stack([reference_rpn_loss(task.detector, (scores, offsets), labels) for _ in range(60)])
    assert_close(ours.mean(), theirs.mean(), rtol=0.01, atol=0)
    assert_close(ours.std(), theirs.std(), rtol=0.5, atol=0)


def sampled(rois: RoIs, targets: PaddedTargets) -> tuple[list[SamplingResult], torch.Tensor]:
    """Return the boxes in the form that MMDetection's heads take, and the index of each in flattened ``rois``."""
    results, order = [], []
    for image, valid in enumerate(targets.valid):
        positive = rois.positive[image].nonzero().flatten()
        negative = rois.negative[image].nonzero().flatten()
        assigned = torch.where(rois.positive[image], rois.label[image] + 1, 0)
        results.append(
            SamplingResult(
                positive,
                negative,
                rois.bboxes[image],
                targets.bboxes[image, valid],
                AssignResult(
                    int(valid.sum()),
                    assigned,
                    torch.zeros(len(assigned)),
                    targets.labels[image, rois.label[image]],
                ),
                torch.zeros(len(assigned), dtype=torch.uint8),
            )
        )
        order += [image * len(assigned) + index for index in (*positive.tolist(), *negative.tolist())]
    return results, torch.tensor(order)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(roi_head__bbox_head__reg_class_agnostic=True, train_cfg__rcnn__pos_weight=3.0),
        dict(roi_head__bbox_head__loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=0.5, loss_weight=2.0)),
    ],
)
def test_the_box_head_loss_is_mmdetections(build: Build, labels: list[InstanceData], changes: dict[str, Any]) -> None:
    task = TwoStageTask(build(**changes), rois_per_image=30, proposals=40)
    samples, maps = begin(task, labels)
    rois = task.sample_rois(flatten_maps(maps[0], 1).squeeze(-1), flatten_maps(maps[1], 4), samples)
    results, order = sampled(rois, samples.targets)
    assert 0 < len(order) < rois.label.numel(), 'some boxes must be fillers'
    head, train_cfg = task.detector.roi_head.bbox_head, task.detector.roi_head.train_cfg
    logits, deltas = torch.randn(rois.label.numel(), 4), torch.randn(rois.label.numel(), head.fc_reg.out_features)
    expected = head.loss_and_target(logits[order], deltas[order], rois.bboxes.new_zeros(0, 5), results, train_cfg)
    ours = bbox_loss(head, logits, deltas, rois, samples.targets, task._coder, train_cfg.pos_weight)
    assert_close(ours, expected['loss_bbox']['loss_cls'] + expected['loss_bbox']['loss_bbox'])


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_the_mask_head_loss_is_mmdetections(build: Build, labels: list[InstanceData], class_agnostic: bool) -> None:
    task = TwoStageTask(build(roi_head__mask_head__class_agnostic=class_agnostic))
    samples, maps = begin(task, labels)
    assert samples.masks is not None
    rois = task.sample_rois(flatten_maps(maps[0], 1).squeeze(-1), flatten_maps(maps[1], 4), samples).truncate(8)
    positive = RoIs(rois.bboxes, rois.label, rois.positive, torch.zeros_like(rois.negative))
    results, order = sampled(positive, samples.targets)
    instances = [InstanceData(masks=BitmapMasks(entry.masks.numpy().astype('uint8'), *SIZE)) for entry in labels]
    head = task.detector.roi_head.mask_head
    logits = torch.randn(rois.label.numel(), head.conv_logits.out_channels, 28, 28)
    train_cfg = task.detector.roi_head.train_cfg
    expected = head.loss_and_target(logits[order], results, instances, train_cfg)
    # MMDetection samples masks once per pixel, this package at a fixed number of points per bin.
    agreement = (mask_targets(samples.masks, rois, (28, 28))[order] == expected['mask_targets']).float().mean()
    assert agreement > 0.99
    ours = mask_loss(head, logits, rois, samples.targets, samples.masks)
    assert_close(ours, expected['loss_mask']['loss_mask'].squeeze(), rtol=5e-3, atol=0)


def test_images_without_objects_give_a_finite_loss_and_no_mask_loss(task: TwoStageTask) -> None:
    empty = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, *SIZE, dtype=torch.bool)
    )
    samples, maps = begin(task, [empty, empty])
    rois = task.sample_rois(flatten_maps(maps[0], 1).squeeze(-1), flatten_maps(maps[1], 4), samples)
    assert not rois.positive.any()
    assert samples.masks is not None
    logits = torch.randn(rois.label.numel(), 3, 28, 28)
    assert mask_loss(task.detector.roi_head.mask_head, logits, rois, samples.targets, samples.masks) == 0
    assert task.loss(torch.rand(2, 3, *SIZE), samples).isfinite()
