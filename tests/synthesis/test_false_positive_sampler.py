# SPDX-License-Identifier: Apache-2.0
"""False-positive sampling adds unlabeled predictions and removes no label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import AdaptiveLabelSampler, FalsePositiveSampler, MultiBoxSampler, RelabelCounts

SIZE = (100, 100)
A = (0.0, 0.0, 20.0, 20.0)
B = (40.0, 40.0, 60.0, 60.0)
C = (70.0, 0.0, 95.0, 20.0)


def instances_of(*boxes: tuple[float, ...], scores: list[float] | None = None, first: int = 0) -> InstanceData:
    """Boxes of classes ``first``, ``first + 1`` and so on."""
    labels = torch.arange(first, first + len(boxes))
    instances = InstanceData(bboxes=torch.tensor(boxes).view(-1, 4), labels=labels)
    if scores is not None:
        instances.scores = torch.tensor(scores)
    return instances


def relabel(labels: InstanceData, predictions: InstanceData, **arguments: Any) -> tuple[list, RelabelCounts]:
    (new,), counts = FalsePositiveSampler(**arguments).relabel([labels], [predictions], SIZE)
    return list(zip(map(tuple, new.bboxes.tolist()), new.labels.tolist(), strict=True)), counts


def test_labels_that_nothing_overlaps_stay() -> None:
    new, counts = relabel(instances_of(A, B), instances_of(C, scores=[0.9], first=7))
    assert new == [(A, 0), (B, 1), (C, 7)]
    assert counts == RelabelCounts(added=1, removed=0)
    # Adaptive sampling would have kept one of the two.
    _, adaptive = AdaptiveLabelSampler().relabel([instances_of(A, B)], [instances_of(C, scores=[0.9])], SIZE)
    assert adaptive == RelabelCounts(added=1, removed=1)


def test_true_positives_and_unsure_predictions_are_not_added() -> None:
    new, counts = relabel(instances_of(A), instances_of(A, B, scores=[0.9, 0.15], first=7))
    assert new == [(A, 0)]
    assert counts == RelabelCounts()


def test_its_thresholds_are_configured() -> None:
    beside = (12.0, 0.0, 32.0, 20.0)  # IoU with A 8 / 32
    prediction = instances_of(beside, scores=[0.5])
    assert relabel(instances_of(A), prediction)[1].added == 1
    assert relabel(instances_of(A), prediction, add_iou=0.24)[1].added == 0
    assert relabel(instances_of(A), prediction, score_thr=0.6)[1].added == 0
    assert relabel(instances_of(A), prediction, area=(0.05, 0.85))[1].added == 0
    twice = instances_of(B, (42.0, 40.0, 62.0, 60.0), scores=[0.9, 0.8])
    twice.labels[:] = 3
    assert relabel(instances_of(A), twice)[1].added == 1
    assert relabel(instances_of(A), twice, nms_iou=0.9)[1].added == 2
    sampler = FalsePositiveSampler(warmup=20, interval=7)
    assert [iteration for iteration in range(40) if sampler.should_relabel(iteration)] == [20, 27, 34]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_it_appends_the_boxes_that_adaptive_sampling_adds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blind = MultiBoxSampler(num_boxes=(1, 8), side=(0.05, 0.95))
    labels = blind.sample(4, SIZE, 3, generator)
    predictions = blind.sample(4, SIZE, 3, generator)
    for predicted in predictions:
        predicted.scores = torch.rand(len(predicted), generator=generator)
    new, counts = FalsePositiveSampler().relabel(labels, predictions, SIZE)
    adaptive, adaptive_counts = AdaptiveLabelSampler().relabel(labels, predictions, SIZE)
    assert counts == RelabelCounts(adaptive_counts.added, 0)
    for before, got, other in zip(labels, new, adaptive, strict=True):
        assert torch.equal(got.bboxes[: len(before)], before.bboxes)
        assert torch.equal(got.labels[: len(before)], before.labels)
        added = len(got) - len(before)
        assert torch.equal(got.bboxes[len(before) :], other.bboxes[len(other) - added :])


def test_it_starts_from_one_box_an_image_and_is_adaptive() -> None:
    sampler = LABEL_SAMPLERS.build(dict(type='mmzsq.FalsePositiveSampler'))
    assert sampler.adaptive
    assert not sampler.uses_real_labels
    labels = sampler.sample(3, SIZE, 5, torch.Generator().manual_seed(0))
    assert [len(instances) for instances in labels] == [1, 1, 1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(start=dict(type='mmzsq.AdaptiveLabelSampler')), 'FalsePositiveSampler: start must be a sampler that is'),
        (dict(score_thr=2), 'FalsePositiveSampler: score_thr must be a number'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FalsePositiveSampler(**arguments)
