# SPDX-License-Identifier: Apache-2.0
"""Detect objects in images, draw them, and write them as COCO results.

``python -m mmzsq.predict MODEL IMAGES_OR_FOLDER --out DIR --config CONFIG`` takes a checkpoint, float or quantized, or
a file of ``python -m mmzsq.export``. An exported file of a dense detector needs no config. Pictures keep the names of
the images; ``predictions.json`` lists the detections. ``--compare-with`` draws another model beside it, by default the
full-precision teacher that the config names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq import cli
from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.engine.prediction import Predictor, load_predictor
from mmzsq.errors import UserError
from mmzsq.masks import encode_mask
from mmzsq.visualization import draw_detections, join_side_by_side

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
TEACHER = 'the teacher of the config'


def main() -> None:
    """Parse the command line, detect, and write pictures and results."""
    args = _parse_args()
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr is {args.score_thr}, but must be in [0, 1]')
    out = Path(args.out)
    images = find_images(args.images)
    check_out(out, images)
    cfg = _load_config(args)
    if Path(args.model).suffix != '.onnx' and (args.runtime is not None or args.threads):
        raise UserError(f'--runtime and --threads are for an exported .onnx file, not for {args.model}')
    predictors = [load_predictor(args.model, cfg, args.runtime, args.threads)]
    if args.compare_with is not None:
        other = _teacher(cfg) if args.compare_with == TEACHER else args.compare_with
        predictors.append(load_predictor(other, cfg, args.runtime, args.threads))
    make_directory(out)
    results: list[list[dict[str, Any]]] = [[] for _ in predictors]
    skipped = 0
    for image_id, path in enumerate(images):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            sys.stderr.write(f'warning: {path} cannot be read as an image: skipped\n')
            skipped += 1
            continue
        found = [predictor(image, args.score_thr) for predictor in predictors]
        for rows, predictor, instances in zip(results, predictors, found, strict=True):
            rows += coco_results(instances, image_id, path.name, predictor.classes)
        content = cv2.imencode(path.suffix, _picture(image, predictors, found)[..., ::-1])[1]
        write_atomically(out / path.name, content.tobytes())
    if skipped == len(images):
        raise UserError(f'none of the {skipped} images can be read')
    for name, rows in zip(('predictions.json', 'compared_predictions.json'), results, strict=False):
        lines = ',\n'.join(json.dumps(row) for row in rows)
        write_atomically(out / name, f'[\n{lines}\n]\n'.encode())
    counts = ', '.join(f'{len(rows)} by {p.title}' for p, rows in zip(predictors, results, strict=True))
    sys.stdout.write(
        f'{len(images) - skipped} images{f", {skipped} skipped" if skipped else ""}; detections with a score of at '
        f'least {args.score_thr:g}: {counts}; written to {out}\n'
    )


def find_images(given: Sequence[str]) -> list[Path]:
    """List images.

    Args:
        given: Files, and folders whose images are taken in the order of their names; not those of folders below.

    Raises:
        UserError: If a path does not exist, a folder has no image, or two images have one name.
    """
    images: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise UserError(f'{path} has no images ({", ".join(SUFFIXES)})')
            images += found
        elif not path.is_file():
            raise UserError(f'{path} does not exist: name an image or a folder of images')
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f'{path} is not an image: its name must end in {", ".join(SUFFIXES)}')
        else:
            images.append(path)
    names: dict[str, Path] = {}
    for path in images:
        if path.name in names:
            raise UserError(f'{names[path.name]} and {path} would become one picture: run them with two --out')
        names[path.name] = path
    return images


def check_out(out: Path, images: Sequence[Path]) -> None:
    """Refuse a folder that cannot take the pictures.

    Raises:
        UserError: If ``out`` is a file, or holds the images, which pictures of the same name would replace.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out} is a file: name a folder')
    for path in images:
        if path.resolve().parent == out.resolve():
            raise UserError(f'--out {out} holds the image {path.name}, which its picture would replace: name another')


def coco_results(
    found: InstanceData, image_id: int, file_name: str, classes: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return detections in COCO's format of results, with the names of file and class.

    Args:
        found: ``bboxes`` (n, 4) xyxy, ``scores``, ``labels`` and perhaps ``masks`` of one image.
        image_id: Index of the image.
        file_name: Name of the image.
        classes: Class names; ``category_id`` is the index of the class.
    """
    rows = []
    for index, (x1, y1, x2, y2) in enumerate(found.bboxes.tolist()):
        label = int(found.labels[index])
        row: dict[str, Any] = dict(
            image_id=image_id,
            file_name=file_name,
            category_id=label,
            category_name=_class_name(classes, label),
            bbox=[round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            score=round(float(found.scores[index]), 5),
        )
        if 'masks' in found:
            row['segmentation'] = encode_mask(found.masks[index].numpy())
        rows.append(row)
    return rows


def _picture(image: np.ndarray, predictors: Sequence[Predictor], found: Sequence[InstanceData]) -> np.ndarray:
    """Draw the detections of each model, RGB, side by side if there are several."""
    pictures = []
    for predictor, instances in zip(predictors, found, strict=True):
        names = [_class_name(predictor.classes, label) for label in instances.labels.tolist()]
        pictures.append(draw_detections(image[..., ::-1], instances, names))
    if len(pictures) == 1:
        return pictures[0]
    # Two files may have one name.
    titles = [f'{index}: {predictor.title}' for index, predictor in enumerate(predictors, 1)]
    return join_side_by_side(dict(zip(titles, pictures, strict=True)))


def _class_name(classes: Sequence[str] | None, label: int) -> str:
    return str(classes[label]) if classes is not None and label < len(classes) else f'class {label}'


def _load_config(args: argparse.Namespace) -> Config | None:
    if args.config is not None:
        return cli.load_config(args)
    if args.cfg_options is not None:
        raise UserError('--cfg-options changes the config: add --config CONFIG')
    return None


def _teacher(cfg: Config | None) -> str:
    teacher = cfg and ((cfg.get('zsq') or {}).get('teacher') or cfg.get('load_from'))
    if not teacher:
        raise UserError('no config names a teacher to compare with: give a checkpoint, --compare-with CHECKPOINT')
    return str(teacher)


def _parse_args() -> argparse.Namespace:
    options = argparse.ArgumentParser(description='Detect objects in images, draw them, and write COCO results.')
    options.add_argument('model', help='exported .onnx file, or a checkpoint: path, URL or mmzsq://NAME')
    options.add_argument('images', nargs='+', metavar='IMAGES_OR_FOLDER', help='images, or folders of images')
    options.add_argument('--out', required=True, metavar='DIR', help='folder of the pictures and predictions.json')
    options.add_argument('--config', help='config of the detector; an exported dense detector needs none')
    options.add_argument(
        '--compare-with',
        nargs='?',
        const=TEACHER,
        metavar='MODEL',
        help='draw another model beside it (default: the full-precision teacher of the config)',
    )
    options.add_argument(
        '--score-thr', type=float, default=0.3, metavar='SCORE', help='least score of a detection (default: 0.3)'
    )
    cli.add_runtime_options(options)
    cli.add_config_options(options)
    options.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return options.parse_args()


if __name__ == '__main__':
    cli.run(main)
