# SPDX-License-Identifier: Apache-2.0
"""Scores of a quantized detector beside those of its teacher.

AP depends on the order of detections alone, but a program that uses a detector has a fixed threshold. Two numbers say
whether the threshold of the teacher still works: the shift of the scores of the objects that both find, and the recall
of both at the threshold at which the teacher is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmzsq.report.matching import area, intersection, match

MIN_SCORE = 0.05
"""Detections with lower scores are not looked at."""

MAX_BOXES = 100
"""Detections of an image that are looked at, those with the highest scores."""

MIN_PAIR_SCORE = 0.25
"""Mean score of a pair from which it counts for the shift.

Most detections have scores of almost zero, which no threshold lets through and which hardly move. A bound on the mean
favors neither detector: one on the teacher's score would select objects whose score the teacher overestimates.
"""

TEACHER = 'float'
TITLES = dict(ptq='PTQ', zero_shot='the student')


def compare_scores(
    found: Mapping[str, Sequence[np.ndarray]], objects: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Compare the scores of quantized detectors with those of their teacher.

    A detection finds an object, or the detection of another detector, if both have the same class and an IoU of at
    least 0.5, the least that COCO's AP accepts.

    Args:
        found: Detections of each image, rows (n, 6) of x1, y1, x2, y2, score and label, for ``'float'``, the teacher,
            and for each quantized detector by its name.
        objects: Labels of each image, rows (m, 6) of x1, y1, x2, y2, 1 or for an object to ignore 0, and label. None if
            there are none.

    Returns:
        ``images``: their number; ``threshold``: the score at which the F1 score of the teacher is highest over all
        classes together, None without objects; ``rows``: for each detector, the share of objects found at this
        threshold (``recall``) and the share of detections that are objects (``precision``), both None without objects,
        and for a quantized one the number of pairs (``matched``) with the quartiles of its score minus the teacher's
        (``shift``, three numbers, None without pairs).
    """
    teacher = found[TEACHER]
    rows: dict[str, dict[str, Any]] = {name: {} for name in found}
    threshold = None
    if objects is not None and any(labels[:, 4].any() for labels in objects):
        hits = {name: _find_objects(detections, objects) for name, detections in found.items()}
        count = sum(int(labels[:, 4].sum()) for labels in objects)
        threshold = _best_threshold(*hits[TEACHER], count)
    for name, row in rows.items():
        row.update(recall=None, precision=None)
        if threshold is not None:
            scores, hit = hits[name]
            kept = hit[scores >= threshold]
            row.update(recall=_short(kept.sum() / count), precision=_short(kept.mean()) if len(kept) else None)
        if name != TEACHER:
            pairs = score_pairs(teacher, found[name])
            shifts = (pairs[:, 1] - pairs[:, 0])[pairs.mean(1) >= MIN_PAIR_SCORE]
            quartiles = np.quantile(shifts, (0.25, 0.5, 0.75)) if len(shifts) else None
            row.update(matched=len(shifts), shift=None if quartiles is None else [_short(q) for q in quartiles])
    return dict(images=len(teacher), threshold=None if threshold is None else _short(threshold), rows=rows)


def score_pairs(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """Return the scores of the objects that two detectors find, (n, 2).

    Args:
        one: Detections of each image, rows (n, 6) of x1, y1, x2, y2, score and label.
        other: Likewise, of the same images.
    """
    pairs = [(a[i, 4], b[j, 4]) for a, b in zip(one, other, strict=True) for i, j in match(a, b)]
    return np.array(pairs, float).reshape(-1, 2)


def _find_objects(detections: Sequence[np.ndarray], objects: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of all detections, and whether each is an object; without those in regions to ignore."""
    scores, hits = [], []
    for rows, labels in zip(detections, objects, strict=True):
        counted, ignored = (labels[labels[:, 4] == value] for value in (1, 0))
        hit = np.zeros(len(rows), bool)
        hit[[index for index, _ in match(rows, counted)]] = True
        inside = intersection(rows, ignored) * (rows[:, None, 5] == ignored[:, 5])
        kept = hit | ~(inside > 0.5 * area(rows)[:, None]).any(1)
        scores.append(rows[kept, 4])
        hits.append(hit[kept])
    return np.concatenate(scores), np.concatenate(hits)


def _best_threshold(scores: np.ndarray, hits: np.ndarray, count: int) -> float | None:
    """Return the lowest score that is let through where F1 is highest; None if no detection is an object."""
    if not hits.any():
        return None
    order = np.argsort(-scores, kind='stable')
    scores, found = scores[order], hits[order].cumsum()
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + count)
    # Detections of equal scores pass a threshold together.
    f1[:-1][scores[:-1] == scores[1:]] = 0
    return float(scores[f1.argmax()])


def _short(value: Any) -> float:
    return round(float(value), 4)


def describe_scores(scores: Mapping[str, Any]) -> str:
    """Describe scores in a line for each quantized detector.

    Args:
        scores: From :func:`compare_scores`, with ``source``: ``'evaluation'`` or ``'calibration set'``.
    """
    lines = []
    for name, row in scores['rows'].items():
        if name == TEACHER:
            continue
        line = f'scores of {TITLES[name]}: '
        if row['shift'] is None:
            line += f'no object of the {scores["images"]} images is found by it and by the teacher'
        else:
            line += f"{row['shift'][1]:+.3f} from the teacher's (median of {row['matched']} objects that both find)"
        if scores['threshold'] is not None:
            teacher = scores['rows'][TEACHER]['recall']
            line += f"; recall {row['recall']:.3f} at the teacher's best threshold, {scores['threshold']:.2f}"
            line += f' (teacher: {teacher:.3f})'
        lines.append(line if scores['source'] == 'evaluation' else f'{line}; on images of the {scores["source"]}')
    return '\n'.join(lines)
