# SPDX-License-Identifier: Apache-2.0
"""Scores of YOLOv5-n students beside those of their teacher, with and without an offset measured on synthetic images.

    python benchmarks/scores.py --students work_dirs/students --images work_dirs/synthetic

Outputs of teacher and students are computed once for each image and kept in a folder. From them follow the detections
for any offset: that of the objectness, which ``tools/model_converters/calibrate_scores.py`` applies, and for
comparison offsets of the class logits. Students are ``yolov5n_BITS.pth``, and synthetic images ``images.npy``, as for
deploy_accuracy.py. ``benchmarks/results_page.py`` shows the result.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deploy_accuracy import BITS, CONFIG
from deploy_models import (
    ROOT,
    build_float,
    build_student,
    command_line,
    describe_versions,
    load_config,
    write_result,
)
from mmdet.structures import DetDataSample
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.engine.scores import detection_rows
from mmzsq.qat.score_offset import MIN_SCORE, score_offset
from mmzsq.report.scores import compare_scores

OUT = Path('benchmarks/results/yolov5-n_scores.json')
FILES = Path('work_dirs/scores')
SIZE = (640, 640)
LEAST_OBJECTNESS = -7.5
"""Logit from which a location is kept: the score threshold of the detector is a probability of 0.001."""

SHRINKAGE = 20
"""Number of locations at the offset common to all classes that a class is averaged with."""

AP_METRIC = 'coco/bbox_mAP'
FLOAT = 'float'
VARIANTS = ('none', 'objectness', 'classes', 'objectness and each class')
"""Offsets that are compared. AP is measured for the first two."""


def batches(source: str, cfg: Any, images: Path) -> Iterator[dict[str, Any]]:
    """Yield batches of the evaluation data (``'real'``) or of the synthetic images (``'synthetic'``)."""
    if source == 'real':
        loader = copy.deepcopy(cfg.test_dataloader)
        loader.update(num_workers=0, persistent_workers=False)
        yield from Runner.build_dataloader(loader, seed=0)
        return
    meta = dict(img_id=0, img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0))
    for image in np.load(images / 'images.npy', mmap_mode='r'):
        pixels = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))
        yield dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=meta)])


@torch.no_grad()
def outputs_of(name: str, source: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return boxes, objectness and class logits of the likely locations of each image, from a file if there is one.

    Args:
        name: ``'float'`` or bits.
        source: As of :func:`batches`.
        args: The command line.
    """
    path = args.files / f'{name}_{source}.pt'
    if path.is_file():
        kept: list[dict[str, Any]] = torch.load(path, weights_only=False)
        return kept
    cfg = load_config(CONFIG.format('w8a8' if name == FLOAT else name))
    if name == FLOAT:
        detector = build_float(cfg, args.teacher or Path(cfg.load_from))
    else:
        detector = build_student(cfg, args.students / f'yolov5n_{name}.pth')
    rows = []
    for batch in batches(source, cfg, args.images):
        data = detector.data_preprocessor(batch, False)
        maps = detector.bbox_head(detector.extract_feat(data['inputs']))[0]
        predictions = detector.bbox_head.dense_predictions(maps)
        for index, sample in enumerate(data['data_samples']):
            boxes, objectness, classes = (output[index] for output in predictions)
            likely = objectness > LEAST_OBJECTNESS
            rows.append(
                dict(
                    b=boxes[likely], o=objectness[likely], c=classes[likely].half(), loc=likely.nonzero()[:, 0],
                    meta=sample.metainfo,
                )
            )  # fmt: skip
    args.files.mkdir(parents=True, exist_ok=True)
    torch.save(rows, path)
    return rows


def common_locations(teacher: Sequence[dict[str, Any]], student: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return objectness (2, P) and class logits (2, P, C) of teacher and student at the locations that both kept."""
    objectness, classes = [], []
    for one, other in zip(teacher, student, strict=True):
        _, i, j = np.intersect1d(one['loc'].numpy(), other['loc'].numpy(), return_indices=True)
        objectness.append(torch.stack((one['o'][i], other['o'][j])))
        classes.append(torch.stack((one['c'][i], other['c'][j])).float())
    return torch.cat(objectness, 1), torch.cat(classes, 1)


def offsets(variant: str, objectness: Tensor, classes: Tensor) -> tuple[float, Tensor]:
    """Return the offset of the objectness, and those of the class logits, (C,).

    Args:
        variant: One of :data:`VARIANTS`.
        objectness: Logits of teacher and student on synthetic images, (2, P).
        classes: Likewise, (2, P, C).
    """
    none = torch.zeros(classes.shape[-1])
    if variant == 'none':
        return 0.0, none
    if variant == 'objectness':
        return score_offset(objectness, classes.amax(-1)), none
    scores = (objectness.sigmoid()[..., None] * classes.sigmoid()).mean(0)
    weights = torch.where(scores >= MIN_SCORE, scores, 0)
    weighted = weights * (classes[0] - classes[1])
    common = weighted.sum() / weights.sum()
    if variant == 'classes':
        return 0.0, none + common
    by_class = (weighted.sum(0) + SHRINKAGE * common) / (weights.sum(0) + SHRINKAGE)
    return score_offset(objectness, (classes + torch.stack((none, by_class))[:, None]).amax(-1)), by_class


def detect(head: Any, rows: Sequence[dict[str, Any]], objectness: float, classes: Tensor) -> list[InstanceData]:
    """Return the detections of each image with offsets, in pixels of the original image."""
    found = []
    for row in rows:
        scores = (row['o'] + objectness).sigmoid(), (row['c'].float() + classes).sigmoid()
        found += head.post_processor.process_batch(
            row['b'][None], scores[0][None], scores[1][None], [row['meta']], rescale=True
        )
    return found


def average_precision(found: Sequence[InstanceData], rows: Sequence[dict[str, Any]], data: Any, cfg: Any) -> float:
    """Return the AP of detections on the evaluation data, in [0, 1]."""
    evaluator = Evaluator(copy.deepcopy(cfg.test_evaluator))
    evaluator.dataset_meta = data.metainfo
    samples = [DetDataSample(metainfo=row['meta']) for row in rows]
    for sample, instances in zip(samples, found, strict=True):
        sample.pred_instances = instances
    evaluator.process(samples)
    return float(evaluator.evaluate(len(rows))[AP_METRIC])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all students and variants."""
    cfg = load_config(CONFIG.format('w8a8'))
    head = build_float(cfg, args.teacher or Path(cfg.load_from)).bbox_head
    data = Runner.build_dataloader(dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)).dataset
    infos = {info['img_id']: info['instances'] for info in map(data.get_data_info, range(len(data)))}
    synthetic, real = (outputs_of(FLOAT, source, args) for source in ('synthetic', 'real'))
    objects = [
        np.array(
            [(*o['bbox'], not o['ignore_flag'], o['bbox_label']) for o in infos[row['meta']['img_id']]], float
        ).reshape(-1, 6)
        for row in real
    ]
    unmoved = torch.zeros(head.num_classes)
    teacher = detect(head, real, 0.0, unmoved)
    students = {}
    for bits in args.bits:
        locations = common_locations(synthetic, outputs_of(bits, 'synthetic', args))
        student = outputs_of(bits, 'real', args)
        variants = {}
        for variant in VARIANTS:
            objectness, classes = offsets(variant, *locations)
            found = detect(head, student, objectness, classes)
            compared = compare_scores(
                dict(float=list(map(detection_rows, teacher)), zero_shot=list(map(detection_rows, found))), objects
            )
            entry = dict(objectness=objectness, classes=float(classes.mean()), **compared['rows']['zero_shot'])
            if variant in VARIANTS[:2]:
                entry['AP'] = average_precision(found, student, data, cfg)
            variants[variant] = entry
            sys.stdout.write(f'{bits}, {variant}: {entry}\n')
            sys.stdout.flush()
        students[bits] = variants
    return dict(
        synthetic_images=len(synthetic),
        evaluation_images=len(real),
        threshold=compared['threshold'],
        teacher=dict(compared['rows'][FLOAT], AP=average_precision(teacher, real, data, cfg)),
        students=students,
        command=command_line(),
        versions=describe_versions(),
    )


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--students', type=Path, required=True, help='folder of yolov5n_BITS.pth')
    parser.add_argument('--images', type=Path, required=True, help='synthetic set in the layout npy')
    parser.add_argument('--teacher', type=Path, help="float checkpoint (default: the config's load_from)")
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument('--files', type=Path, default=FILES, help=f'folder of kept outputs (default: {FILES})')
    write_result(ROOT / OUT, measure(parser.parse_args()))


if __name__ == '__main__':
    main()
