# SPDX-License-Identifier: Apache-2.0
"""Scores of teacher and student: shift, threshold and recall on boxes that are placed by hand, and against COCO's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmzsq.report.scores import compare_scores, describe_scores, score_pairs


def boxes(*rows: tuple[float, float, int]) -> np.ndarray:
    """Squares of side 10 that begin at x: rows of x, score and label."""
    table = [(x, 0.0, x + 10, 10.0, score, label) for x, score, label in rows]
    return np.array(table, float).reshape(-1, 6)


OBJECTS = [boxes((0, 1, 0), (20, 1, 1), (40, 0, 0)), boxes((0, 1, 0), (60, 1, 0))]
TEACHER = [
    # Two objects, one of the wrong class, and one in a region to ignore.
    boxes((0, 0.9, 0), (21, 0.6, 1), (20, 0.55, 0), (40, 0.8, 0)),
    boxes((0, 0.5, 0), (30, 0.4, 0)),
]
STUDENT = [boxes((1, 0.7, 0), (21, 0.45, 1), (40, 0.8, 0)), boxes((0, 0.2, 0), (60, 0.52, 0))]


def test_recall_is_that_at_the_best_threshold_of_the_teacher() -> None:
    scores = compare_scores(dict(float=TEACHER, zero_shot=STUDENT), OBJECTS)
    # Hits from the highest score on: yes, yes, no, yes, no. F1 is 0.4, 0.67, 0.57, 0.75, 0.67.
    assert scores['images'] == 2 and scores['threshold'] == 0.5
    teacher, student = scores['rows']['float'], scores['rows']['zero_shot']
    assert teacher == dict(recall=0.75, precision=0.75)
    assert (student['recall'], student['precision']) == (0.5, 1.0)
    # Pairs of 0.9 and 0.7, 0.6 and 0.45, 0.8 and 0.8, 0.5 and 0.2.
    assert student['matched'] == 4
    assert student['shift'] == pytest.approx(np.quantile([-0.2, -0.15, 0, -0.3], (0.25, 0.5, 0.75)).tolist())


def test_equal_scores_pass_the_threshold_together() -> None:
    teacher = [boxes((0, 0.5, 0), (20, 0.5, 0), (40, 0.5, 0))]
    scores = compare_scores(dict(float=teacher, ptq=teacher), [boxes((0, 1, 0))])
    assert scores['threshold'] == 0.5 and scores['rows']['ptq']['precision'] == pytest.approx(1 / 3, abs=1e-4)


def test_faint_pairs_do_not_count() -> None:
    faint = compare_scores(dict(float=[boxes((0, 0.3, 0))], ptq=[boxes((0, 0.1, 0))]))
    assert faint['threshold'] is None
    assert faint['rows']['ptq'] == dict(recall=None, precision=None, matched=0, shift=None)
    assert 'no object of the 1 images' in describe_scores(dict(faint, source='calibration set'))
    none = compare_scores(dict(float=[boxes()], ptq=[boxes()]), [boxes()])
    assert none['threshold'] is None and none['rows']['ptq']['matched'] == 0


def test_same_detector_has_no_shift() -> None:
    scores = compare_scores(dict(float=TEACHER, ptq=TEACHER), OBJECTS)
    assert scores['rows']['ptq']['shift'] == [0, 0, 0]
    assert scores['rows']['ptq']['recall'] == scores['rows']['float']['recall']
    assert describe_scores(dict(scores, source='evaluation')) == (
        "scores of PTQ: +0.000 from the teacher's (median of 6 objects that both find); recall 0.750 at the teacher's "
        'best threshold, 0.50 (teacher: 0.750)'
    )


def test_found_objects_are_those_of_pycocotools() -> None:
    generator = np.random.default_rng(0)
    objects, found = [], []
    for _ in range(5):
        corners = generator.uniform(0, 60, (8, 2))
        sizes = generator.uniform(10, 40, (8, 2))
        labels = generator.integers(0, 2, (8, 1))
        objects.append(np.concatenate((corners, corners + sizes, np.ones((8, 1)), labels), 1))
        moved = np.repeat(objects[-1], 2, 0)
        moved[:, :4] += generator.normal(0, 3, (16, 4))
        moved[:, 4] = generator.random(16)
        found.append(moved)
    scores = compare_scores(dict(float=found, ptq=found), objects)
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=image) for image in range(5)],
        categories=[dict(id=0), dict(id=1)],
        annotations=[
            dict(id=100 * image + index + 1, image_id=image, iscrowd=0, area=1.0, **_category_and_box(row))
            for image, rows in enumerate(objects)
            for index, row in enumerate(rows)
        ],
    )
    coco.createIndex()
    kept = [(image, row) for image, rows in enumerate(found) for row in rows if row[4] >= scores['threshold']]
    detections = [dict(image_id=image, score=float(row[4]), **_category_and_box(row)) for image, row in kept]
    evaluation = COCOeval(coco, coco.loadRes(detections), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    # AR of each class at an IoU of 0.5 and 100 detections; both have their share of the 40 objects.
    recall = evaluation.eval['recall'][0, :, 0, 2]
    share = np.array([sum((rows[:, 5] == label).sum() for rows in objects) for label in (0, 1)]) / 40
    assert scores['rows']['ptq']['recall'] == pytest.approx(float(recall @ share), abs=1e-4)
    assert len(score_pairs(found, found)) == 80


def _category_and_box(row: np.ndarray) -> dict[str, Any]:
    return dict(category_id=int(row[5]), bbox=[*row[:2].tolist(), *(row[2:4] - row[:2]).tolist()])
