# SPDX-License-Identifier: Apache-2.0
"""Detections of an evaluation, collected on the side to compare scores of teacher and student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmzsq.report.scores import MAX_BOXES, MIN_SCORE, TEACHER, compare_scores

Detections = dict[Any, np.ndarray]
"""Rows of x1, y1, x2, y2, score and label of each image, by its ``img_id``."""


def detection_rows(found: InstanceData) -> np.ndarray:
    """Return the detections of an image with the highest scores as rows.

    Args:
        found: ``bboxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,).

    Returns:
        x1, y1, x2, y2, score and label in float32, (n, 6), by descending score.
    """
    columns = (found.bboxes, found.scores[:, None], found.labels[:, None])
    rows = torch.cat([column.detach().float().cpu() for column in columns], 1)
    rows = rows[rows[:, 4] >= MIN_SCORE]
    array: np.ndarray = rows[rows[:, 4].argsort(descending=True, stable=True)][:MAX_BOXES].numpy()
    return array


@contextmanager
def collected_detections(runner: Runner, into: dict[str, Detections], row: str) -> Iterator[None]:
    """Collect the detections that the evaluation inside the block hands to its metrics.

    Detections without boxes or scores collect nothing.

    Args:
        runner: A runner with a built validation loop.
        into: Receives the detections of this process under the name of the row.
        row: Name of the row of the results.
    """
    evaluator = runner.val_loop.evaluator
    process = evaluator.process
    found: Detections = {}

    def collect(data_samples: Sequence[Any], data_batch: Any = None) -> None:
        for sample in data_samples:
            key, instances = sample.get('img_id'), sample.get('pred_instances')
            if key is not None and instances is not None and {'bboxes', 'scores', 'labels'} <= set(instances.keys()):
                found[key] = detection_rows(instances)
        process(data_samples=data_samples, data_batch=data_batch)

    evaluator.process = collect
    try:
        yield
    finally:
        del evaluator.process
    into[row] = found


def evaluation_scores(runner: Runner, found: Mapping[str, Detections]) -> dict[str, Any] | None:
    """Compare the scores of teacher and students on the evaluation data. To be called in all processes.

    Args:
        runner: A runner with a built validation loop.
        found: Detections of this process, of each row of the results.

    Returns:
        See :func:`~mmzsq.report.scores.compare_scores`; None without detections of teacher and student, and in all
        processes but the first.
    """
    merged: dict[str, Detections] = {}
    shared = all_gather_object(dict(found))
    for shares in shared if is_main_process() else ():
        for row, detections in shares.items():
            merged.setdefault(row, {}).update(detections)
    images = list(merged.get(TEACHER, {}))
    rows = {row: [detections[key] for key in images] for row, detections in merged.items() if detections}
    if not images or len(rows) == 1:
        return None
    labels = _objects(runner.val_loop.dataloader.dataset)
    objects = [labels[key] for key in images] if all(key in labels for key in images) else None
    return dict(source='evaluation', **compare_scores(rows, objects))


def _objects(dataset: Any) -> Detections:
    """Return x1, y1, x2, y2, 1 (0 if ignored) and label of the objects of each image that the data set labels."""
    objects = {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        if 'instances' in info and 'img_id' in info:
            rows = [(*o['bbox'], not o.get('ignore_flag'), o['bbox_label']) for o in info['instances']]
            objects[info['img_id']] = np.array(rows, np.float32).reshape(-1, 6)
    return objects
