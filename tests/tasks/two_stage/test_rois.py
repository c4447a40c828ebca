# SPDX-License-Identifier: Apache-2.0
"""Boxes are assigned as in MMDetection and sampled at random."""

from typing import Any

import pytest
import torch
from mmdet.models.task_modules import MaxIoUAssigner
from mmengine.structures import InstanceData

from mmzsq.boxes import pairwise_iou
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.tasks.two_stage.rois import Proposals, assign_by_iou, jitter_boxes, sample_rois
from mmzsq.tasks.two_stage.sampling import random_subset

SIZE = (100, 120)
WHOLE = torch.tensor([0.0, 0.0, 120.0, 100.0])


def random_bboxes(*shape: int) -> torch.Tensor:
    low = torch.rand(*shape, 2) * 60
    return torch.cat((low, low + 4 + torch.rand(*shape, 2) * 40), dim=-1)


def padded(*counts: int) -> PaddedTargets:
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    bboxes = torch.where(valid[..., None], random_bboxes(len(counts), max(counts)), WHOLE)
    return PaddedTargets(bboxes, torch.randint(3, valid.shape), valid)


def choose(proposals: Proposals, targets: PaddedTargets, **changes: Any) -> Any:
    options: dict[str, Any] = dict(count=24, pos_fraction=0.25, jittered=3, jitter_amount=0.15)
    assigner = MaxIoUAssigner(0.5, 0.5, min_pos_iou=0.5)
    return sample_rois(proposals, targets, assigner, SIZE, WHOLE, **{**options, **changes})


@pytest.mark.parametrize('match_low_quality', [True, False])
def test_boxes_are_assigned_as_mmdetection_does(match_low_quality: bool) -> None:
    assigner = MaxIoUAssigner(0.5, 0.3, min_pos_iou=0.2, match_low_quality=match_low_quality)
    targets, bboxes = padded(3, 1, 6), random_bboxes(3, 60)
    overlaps = pairwise_iou(bboxes, targets.bboxes).masked_fill(~targets.valid[:, None], -1)
    assigned = assign_by_iou(overlaps, assigner)
    for image in range(3):
        valid = targets.valid[image]
        labels = InstanceData(bboxes=targets.bboxes[image, valid], labels=targets.labels[image, valid])
        expected = assigner.assign(InstanceData(priors=bboxes[image]), labels)
        assert torch.equal(assigned[image], expected.gt_inds)
    assert assigned.min() == -1
    assert (assigned == 0).any()
    assert (assigned > 0).any()


def test_an_image_without_labels_is_background() -> None:
    assert not assign_by_iou(torch.full((1, 5, 2), -1.0), MaxIoUAssigner(0.5, 0.5, min_pos_iou=0.0)).any()


def test_samples_have_the_requested_count_and_equal_probability() -> None:
    eligible = torch.tensor([True, False, True, True, True]).repeat(4000, 1)
    count = torch.arange(4).repeat(1000)
    chosen = random_subset(eligible, torch.rand(eligible.shape), 3, count)
    assert torch.equal(chosen.sum(1), count)
    frequency = chosen.float().mean(0)
    assert frequency[1] == 0
    assert (frequency[eligible[0]] - 1.5 / 4).abs().max() < 0.03


def test_all_are_sampled_if_there_are_too_few() -> None:
    eligible = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(random_subset(eligible, torch.rand(2, 3), 100, torch.tensor([100, 100])), eligible)


def test_positive_boxes_overlap_their_label_and_are_limited_in_number() -> None:
    targets = padded(4, 1)
    rois = choose(Proposals(random_bboxes(2, 200), torch.ones(2, 200, dtype=torch.bool)), targets)
    image = torch.arange(2)[:, None]
    overlaps = pairwise_iou(rois.bboxes, targets.bboxes).masked_fill(~targets.valid[:, None], 0)
    assert rois.bboxes.shape == (2, 24, 4)
    assert (rois.positive.sum(1) == 6).tolist() == [True, rois.positive[1].sum() == 6]
    assert (rois.positive.sum(1) + rois.negative.sum(1) == 24).all()
    assert (overlaps[image, torch.arange(24), rois.label][rois.positive] >= 0.5).all()
    assert (overlaps.amax(2)[rois.negative] < 0.5).all()
    assert rois.positive[:, :-1].long().diff().le(0).all(), 'positive boxes come first'


def test_suppressed_proposals_and_padding_are_ignored() -> None:
    targets = padded(2, 0, 1)
    rois = choose(Proposals(random_bboxes(3, 40), torch.zeros(3, 40, dtype=torch.bool)), targets, jittered=0)
    assert rois.positive.sum(1).tolist() == [2, 0, 1]
    assert not rois.negative.any()
    assert torch.equal(rois.bboxes[0, :2].sort(0).values, targets.bboxes[0].sort(0).values)
    assert (rois.bboxes[~rois.positive] == WHOLE).all()


def test_jittered_labels_stay_in_the_image_and_only_close_ones_are_positive() -> None:
    targets = padded(3)
    copies = jitter_boxes(targets.bboxes, 50, 0.4, SIZE)
    assert copies.min() >= 0
    assert (copies <= WHOLE[2:].repeat(2)).all()
    assert pairwise_iou(copies, targets.bboxes[:, :, None]).min() < 0.5
    nothing = Proposals(random_bboxes(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    rois = choose(nothing, targets, count=100, pos_fraction=1.0, jittered=50, jitter_amount=0.4)
    own = targets.bboxes[0, rois.label[0]]
    overlap = pairwise_iou(rois.bboxes[0, :, None], own[:, None]).flatten()
    assert rois.positive.sum() > 20
    assert (overlap[rois.positive[0]] >= 0.5).all()
