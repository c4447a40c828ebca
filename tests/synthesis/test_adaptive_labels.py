# SPDX-License-Identifier: Apache-2.0
"""Adaptive label sampling, rule by rule, on boxes of known overlap in 100 x 100 pixel images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import AdaptiveLabelSampler, LabelSampler, MultiBoxSampler

SIZE = (100, 100)
A = (0.0, 0.0, 20.0, 20.0)
B = (40.0, 40.0, 60.0, 60.0)
C = (70.0, 0.0, 95.0, 20.0)
SHIFTED_A = (5.0, 0.0, 25.0, 20.0)  # IoU with A 15 * 20 / (25 * 20) = 0.6
FAR_SHIFTED_A = (12.0, 0.0, 32.0, 20.0)  # IoU with A 8 * 20 / (32 * 20) = 0.25


def labels_of(*boxes: tuple[float, ...], classes: list[int] | None = None) -> InstanceData:
    return InstanceData(
        bboxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.tensor(classes or [0] * len(boxes), dtype=torch.long),
    )


def predictions_of(*rows: tuple[tuple[float, ...], float, int]) -> InstanceData:
    """Rows of (box, score, class)."""
    return InstanceData(
        bboxes=torch.tensor([row[0] for row in rows]).view(-1, 4),
        scores=torch.tensor([row[1] for row in rows]),
        labels=torch.tensor([row[2] for row in rows], dtype=torch.long),
    )


def relabel(
    labels: InstanceData, predictions: InstanceData, **arguments
) -> tuple[list[tuple[tuple[float, ...], int]], tuple[int, int]]:
    """The new labels of one image as rows of (box, class), and (added, removed)."""
    (new,), counts = AdaptiveLabelSampler(**arguments).relabel([labels], [predictions], SIZE)
    rows = zip(map(tuple, new.bboxes.tolist()), new.labels.tolist(), strict=True)
    return list(rows), (counts.added, counts.removed)


def test_an_unlabeled_prediction_is_added_with_its_class():
    new, counts = relabel(labels_of(A), predictions_of((B, 0.9, 7)))
    assert new == [(A, 0), (B, 7)]
    assert counts == (1, 0)


def test_a_prediction_on_a_labeled_place_is_not_added_whatever_its_class():
    new, counts = relabel(labels_of(A, classes=[3]), predictions_of((SHIFTED_A, 0.9, 7)))
    assert new == [(A, 3)]
    assert counts == (0, 0)


def test_overlap_below_the_threshold_does_not_keep_a_prediction_out():
    new, counts = relabel(labels_of(A), predictions_of((FAR_SHIFTED_A, 0.9, 7)))
    assert new == [(A, 0), (FAR_SHIFTED_A, 7)]
    assert counts == (1, 0)


@pytest.mark.parametrize(('add_iou', 'added'), [(0.24, 0), (0.26, 1)])
def test_the_threshold_of_adding_is_configured(add_iou, added):
    prediction = predictions_of((FAR_SHIFTED_A, 0.9, 7))
    assert relabel(labels_of(A), prediction, add_iou=add_iou)[1] == (added, 0)


@pytest.mark.parametrize(('score', 'added'), [(0.19, 0), (0.2, 0), (0.21, 1)])
def test_only_predictions_above_the_score_threshold_count(score, added):
    assert relabel(labels_of(A), predictions_of((B, score, 7)))[1] == (added, 0)


@pytest.mark.parametrize(
    ('box', 'added'),
    [
        ((40.0, 40.0, 49.0, 51.0), 0),  # 0.99 % of the image
        ((40.0, 40.0, 50.0, 50.0), 0),  # exactly 1 %: the interval is open
        ((40.0, 40.0, 50.0, 50.5), 1),
        ((0.0, 15.0, 100.0, 99.0), 1),  # 84 %
        ((0.0, 14.0, 100.0, 99.0), 0),  # exactly 85 %
        ((0.0, 10.0, 100.0, 99.0), 0),
    ],
)
def test_only_predictions_of_a_likely_area_are_added(box, added):
    assert relabel(labels_of(A), predictions_of((box, 0.9, 7)))[1] == (added, 0)


def test_predictions_are_clipped_to_the_image():
    new, _ = relabel(labels_of(A), predictions_of(((80.0, 80.0, 130.0, 120.0), 0.9, 7)))
    assert new == [(A, 0), ((80.0, 80.0, 100.0, 100.0), 7)]


def test_suppression_keeps_the_best_of_one_class_and_one_of_each_class():
    shifted_b = (42.0, 40.0, 62.0, 60.0)  # IoU with B 18 / 22 = 0.82
    one_class = predictions_of((shifted_b, 0.5, 7), (B, 0.9, 7))
    assert relabel(labels_of(A), one_class)[0] == [(A, 0), (B, 7)]
    two_classes = predictions_of((shifted_b, 0.5, 8), (B, 0.9, 7))
    assert relabel(labels_of(A), two_classes)[0] == [(A, 0), (B, 7), (shifted_b, 8)]
    assert len(relabel(labels_of(A), one_class, nms_iou=0.9)[0]) == 3


def test_suppression_separates_many_classes_without_losing_precision():
    # In fp32, the offset of class 999,999 is a multiple of 8 pixels, and rounds boxes to such.
    rows = [(40.0 + shift, 40.0, 60.0 + shift, 60.0) for shift in range(0, 40, 6)]  # IoU 0.54
    predictions = predictions_of(*[(row, 0.9, 999_999) for row in rows])
    new, _ = relabel(labels_of(A), predictions)
    assert [box for box, _ in new] == [A, *rows]


def test_a_label_that_no_prediction_overlaps_is_removed():
    new, counts = relabel(labels_of(A, B, classes=[1, 2]), predictions_of((A, 0.9, 1)))
    assert new == [(A, 1)]
    assert counts == (0, 1)


def test_a_label_overlapped_by_another_class_stays_with_its_class_and_place():
    new, counts = relabel(labels_of(A, B, classes=[1, 2]), predictions_of((SHIFTED_A, 0.9, 5), (B, 0.9, 2)))
    assert new == [(A, 1), (B, 2)]
    assert counts == (0, 0)


def test_an_only_label_is_never_removed():
    new, counts = relabel(labels_of(A), predictions_of((B, 0.9, 7)))
    assert new[0] == (A, 0)
    assert counts == (1, 0)


def test_an_image_without_labels_gets_all_predictions():
    new, counts = relabel(labels_of(), predictions_of((B, 0.9, 7)))
    assert new == [(B, 7)]
    assert counts == (1, 0)
    assert relabel(labels_of(), predictions_of()) == ([], (0, 0))


@pytest.mark.parametrize('predictions', [predictions_of(), predictions_of((C, 0.1, 7))])
def test_nothing_is_removed_when_nothing_is_predicted(predictions):
    new, counts = relabel(labels_of(A, B), predictions)
    assert new == [(A, 0), (B, 0)]
    assert counts == (0, 0)


def test_the_best_overlapping_label_stays_when_all_would_go():
    barely = (47.0, 40.0, 80.0, 60.0)  # IoU with B 13 / 40 = 0.325, with A 0
    new, counts = relabel(labels_of(A, B, classes=[1, 2]), predictions_of((barely, 0.9, 7)))
    assert new == [(B, 2), (barely, 7)]
    assert counts == (1, 1)


def test_a_prediction_too_small_to_be_added_still_keeps_a_label():
    small = (0.0, 0.0, 9.0, 9.0)
    new, counts = relabel(labels_of(small, B), predictions_of((small, 0.9, 7)))
    assert new == [(small, 0)]
    assert counts == (0, 1)


@pytest.mark.parametrize(('remove_iou', 'removed'), [(0.24, 0), (0.26, 1)])
def test_the_threshold_of_removing_is_configured(remove_iou, removed):
    predictions = predictions_of((FAR_SHIFTED_A, 0.9, 7), (B, 0.9, 2))
    counts = relabel(labels_of(A, B), predictions, remove_iou=remove_iou, add_iou=0)[1]
    assert counts == (0, removed)


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inter / (areas - inter)


def reference(labels: list, predictions: list) -> list:
    """The paper's rules in plain loops over rows of (box, class) and (box, score, class)."""
    kept: list = []
    for box, score, label in sorted(predictions, key=lambda row: -row[1]):
        if score > 0.2 and not any(c == label and iou(box, k) > 0.6 for k, c in kept):
            kept.append((box, label))
    stay = []
    for box, label in labels:
        seen = any(iou(box, k) >= 0.35 for k, _ in kept)
        if seen or len(labels) == 1 or not kept:
            stay.append((box, label))
    if not stay:
        stay = [max(labels, key=lambda row: max(iou(row[0], k) for k, _ in kept))]
    for box, label in kept:
        share = (box[2] - box[0]) * (box[3] - box[1]) / 10_000
        if 0.01 < share < 0.85 and all(iou(box, current) < 0.35 for current, _ in labels):
            stay.append((box, label))
    return stay


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_it_agrees_with_plain_loops_on_crowded_images(seed):
    generator = torch.Generator().manual_seed(seed)
    blind = MultiBoxSampler(num_boxes=(1, 8), side=(0.05, 0.95))
    labels = blind.sample(4, SIZE, 3, generator)
    predictions = blind.sample(4, SIZE, 3, generator)
    for current, predicted in zip(labels, predictions, strict=True):
        # Some predictions sit near labels, as they do once images are optimized.
        near = min(len(current), len(predicted)) // 2
        predicted.bboxes[:near] = (current.bboxes[:near] + 5).clamp(max=100)
        predicted.scores = torch.rand(len(predicted), generator=generator)
    new, _ = AdaptiveLabelSampler().relabel(labels, predictions, SIZE)
    for current, predicted, got in zip(labels, predictions, new, strict=True):
        expected = reference(
            list(zip(current.bboxes.tolist(), current.labels.tolist(), strict=True)),
            list(
                zip(
                    predicted.bboxes.tolist(),
                    predicted.scores.tolist(),
                    predicted.labels.tolist(),
                    strict=True,
                )
            ),
        )
        assert len(got) > 0
        rows = list(zip(got.bboxes.tolist(), got.labels.tolist(), strict=True))
        assert rows == expected


def test_images_are_independent_and_inputs_untouched():
    labels = [labels_of(A), labels_of(A, B)]
    predictions = [predictions_of((B, 0.9, 7)), predictions_of((A, 0.9, 7))]
    new, counts = AdaptiveLabelSampler().relabel(labels, predictions, SIZE)
    assert [len(instances) for instances in new] == [2, 1]
    assert (counts.added, counts.removed) == (1, 1)
    assert [len(instances) for instances in labels] == [1, 2]
    assert [len(instances) for instances in predictions] == [1, 1]


def test_masks_follow_their_boxes():
    label = labels_of(A, B)
    label.masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    label.masks[0, :20, :20] = True
    prediction = predictions_of((A, 0.9, 0), (C, 0.8, 1))
    prediction.masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    prediction.masks[1, :20, 70:95] = True
    (new,), _ = AdaptiveLabelSampler().relabel([label], [prediction], SIZE)
    assert torch.equal(new.masks[0], label.masks[0])
    assert torch.equal(new.masks[1], prediction.masks[1])


def test_masks_stay_with_their_predictions_through_thresholds_clipping_and_suppression():
    shifted_b = (42.0, 40.0, 62.0, 60.0)  # IoU with B 18 / 22 = 0.82
    out_of_image = (80.0, 80.0, 130.0, 120.0)
    prediction = predictions_of((C, 0.1, 1), (shifted_b, 0.5, 7), (out_of_image, 0.6, 2), (B, 0.9, 7))
    prediction.masks = torch.zeros(4, 100, 100, dtype=torch.bool)
    prediction.masks[range(4), range(4), 0] = True
    label = labels_of(A)
    label.masks = torch.ones(1, 100, 100, dtype=torch.bool)
    (new,), _ = AdaptiveLabelSampler().relabel([label], [prediction], SIZE)
    assert new.labels.tolist() == [0, 7, 2]
    assert torch.equal(new.masks, torch.cat([label.masks, prediction.masks[[3, 2]]]))


def test_a_prediction_with_an_empty_mask_is_not_added_but_keeps_a_label():
    prediction = predictions_of((SHIFTED_A, 0.9, 0), (B, 0.8, 1))
    prediction.masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    label = labels_of(A, C)
    label.masks = torch.ones(2, 100, 100, dtype=torch.bool)
    (new,), counts = AdaptiveLabelSampler().relabel([label], [prediction], SIZE)
    assert new.bboxes.tolist() == [list(A)]
    assert (counts.added, counts.removed) == (0, 1)


def test_half_precision_predictions_become_labels_of_the_usual_type():
    prediction = predictions_of((B, 0.9, 7))
    prediction.bboxes = prediction.bboxes.bfloat16()
    prediction.scores = prediction.scores.bfloat16()
    (new,), _ = AdaptiveLabelSampler().relabel([labels_of(A)], [prediction], SIZE)
    assert new.bboxes.dtype == torch.float32
    assert new.labels.dtype == torch.long


def test_it_relabels_after_warmup_and_then_every_interval():
    sampler = AdaptiveLabelSampler(warmup=800, interval=100)
    due = [iteration for iteration in range(1150) if sampler.should_relabel(iteration)]
    assert due == [800, 900, 1000, 1100]


def test_it_starts_from_one_box_an_image_by_default():
    sampler = LABEL_SAMPLERS.build(dict(type='mmzsq.AdaptiveLabelSampler'))
    assert sampler.adaptive
    assert not sampler.uses_real_labels
    labels = sampler.sample(3, SIZE, 5, torch.Generator().manual_seed(0))
    assert [len(instances) for instances in labels] == [1, 1, 1]


def test_it_uses_real_labels_if_its_start_does(monkeypatch):
    class RealStub(LabelSampler):
        uses_real_labels = True

        def sample(self, num_images, image_size, num_classes, generator):
            return []

    monkeypatch.setitem(LABEL_SAMPLERS.module_dict, 'RealStub', RealStub)
    assert AdaptiveLabelSampler(start=dict(type='RealStub')).uses_real_labels


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            dict(start=dict(type='mmzsq.AdaptiveLabelSampler')),
            'start must be a sampler that is not',
        ),
        (dict(warmup=-1), 'warmup must be an integer of at least 0, got -1'),
        (dict(interval=0), 'interval must be an integer of at least 1, got 0'),
        (dict(warmup=0.5), 'warmup must be an integer'),
        (dict(score_thr=1.2), r'score_thr must be a number in \[0, 1\], got 1.2'),
        (dict(nms_iou='x'), 'nms_iou'),
        (dict(add_iou=True), 'add_iou'),
        (dict(remove_iou=2), 'remove_iou'),
        (dict(area=(0.9, 0.1)), 'area must be two numbers'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        AdaptiveLabelSampler(**arguments)
