# SPDX-License-Identifier: Apache-2.0
"""Measure the health of sets known to be good or bad, from which the limits of the warnings are derived.

    python benchmarks/image_health.py configs/zsq/yolov5-n_w8a8.py --checkpoint yolov5n.safetensors \
        --real data/coco/val2017 --images synthetic=images.npy --images dead_leaves=DIR --out image_health.json

Sets that are made here: ``uniform`` and ``gaussian`` noise, ``haze`` (one color with a faint, blurred pattern), and
``adversarial`` (noise optimized for the detection loss alone). The labels of every other set are the detections of the
teacher, so "in the image" is 100 % there. ``--real`` is letterboxed to the size of synthesis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from markdown_pages import markdown_table
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.config.compose import complete_section, detector_section
from mmzsq.errors import UserError
from mmzsq.qat.teacher import load_teacher
from mmzsq.registry import LABEL_SAMPLERS, build_part
from mmzsq.synthesis.health import FOUND_SCORE, ImageHealth, measure
from mmzsq.synthesis.label_samplers import fit_masks
from mmzsq.tasks import build_detection_task

SEED = 0


def main() -> None:
    """Measure all sets and print the table."""
    args = _parse_args()
    register_all_modules()
    cfg = Config.fromfile(args.config)
    detector = MODELS.build(detector_section(cfg))
    load_teacher(detector, args.checkpoint)
    task = build_detection_task(detector.to('cuda' if torch.cuda.is_available() else 'cpu'))
    size = (args.size, args.size)
    sets: dict[str, tuple[np.ndarray, list[InstanceData] | None]] = {}
    if args.real is not None:
        sets['real'] = letterboxed(sorted(args.real.glob('*.jpg'))[: args.count], args.size), None
    for given in args.images or []:
        name, _, path = given.partition('=')
        sets[name] = read_images(Path(path), args.count), None
    generator = np.random.default_rng(SEED)
    shape = (args.count, *size, 3)
    sets['uniform'] = generator.integers(0, 256, shape, dtype=np.uint8), None
    sets['gaussian'] = to_pixels(generator.normal(0.5, 0.2, shape)), None
    sets['haze'] = haze(args.count, args.size, generator), None
    section = complete_section(cfg.zsq.to_dict())
    sampler = build_part(LABEL_SAMPLERS, section['label_sampler'], 'zsq.label_sampler')
    drawn = sampler.sample(args.adversarial, size, task.num_classes, torch.Generator().manual_seed(SEED))
    drawn = fit_masks(drawn, size, task.needs_masks)
    sets['adversarial'] = adversarial(task, drawn, size, args.iterations), drawn
    results = {}
    for name, (images, labels) in sets.items():
        results[name] = measure(task, images, detections(task, images) if labels is None else labels)
    rows = {name: health.to_dict() for name, health in results.items()}
    if args.out is not None:
        content = dict(config=args.config, size=args.size, iterations=args.iterations, sets=rows)
        write_atomically(args.out, to_json(content, indent=1))
    sys.stdout.write(f'{table(results)}\n')


def table(results: dict[str, ImageHealth]) -> str:
    """Return the measures of all sets as a Markdown table."""
    rows = []
    for name, health in results.items():
        labels, pixels, batch_norm = health.labels, health.pixels, health.batch_norm
        shares = (labels.image, labels.mirrored, labels.half_size) if labels is not None else (None, None, None)
        rows.append(
            [
                name,
                str(health.images),
                '-' if batch_norm is None else f'{batch_norm.median:.1f}',
                '0' if labels is None else f'{labels.count / health.images:.1f}',
                *('-' if share is None else f'{share:.0%}' for share in shares),
                f'{pixels.contrast:.2f}',
                f'{pixels.saturation_spread:.2f}',
                f'{pixels.clipped:.0%}',
                f'{pixels.spectrum_slope:.1f}',
                str(len(health.warnings)),
            ]
        )
    header = ['set', 'images', 'BatchNorm distance', 'labels an image', 'found', 'mirrored', 'half size', 'contrast']
    return markdown_table([*header, 'saturation spread', 'clipped', 'slope', 'warnings'], rows)


def letterboxed(paths: Sequence[Path], side: int) -> np.ndarray:
    """Read images and fit them into squares, padded with gray; uint8 RGB (N, side, side, 3)."""
    images = np.full((len(paths), side, side, 3), 114, np.uint8)
    for canvas, path in zip(images, paths, strict=True):
        image = read_image(path)
        factor = side / max(image.shape[:2])
        height, width = (max(round(length * factor), 1) for length in image.shape[:2])
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = cv2.resize(np.ascontiguousarray(image), (width, height))
    return images


def read_images(path: Path, count: int) -> np.ndarray:
    """Read ``images.npy``, or a folder of PNG files; uint8 RGB (N, H, W, 3)."""
    if path.suffix == '.npy':
        return np.load(path)[:count]
    return np.stack([read_image(file) for file in sorted(path.glob('*.png'))[:count]])


def read_image(path: Path) -> np.ndarray:
    """Read a file as uint8 RGB (H, W, 3)."""
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f'{path} is not an image')
    return image[..., ::-1]


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to uint8."""
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


def haze(count: int, side: int, generator: np.random.Generator) -> np.ndarray:
    """Draw images of one color with a faint, blurred pattern; uint8 (count, side, side, 3)."""
    images = []
    for _ in range(count):
        pattern = cv2.GaussianBlur(generator.normal(size=(side, side, 3)), (0, 0), side / 40)
        images.append(generator.uniform(0.3, 0.7, 3) + 0.03 * pattern / pattern.std())
    return to_pixels(np.stack(images))


def adversarial(task: Any, labels: list[InstanceData], size: tuple[int, int], iterations: int) -> np.ndarray:
    """Optimize noise for the detection loss of labels alone; uint8 RGB (N, H, W, 3)."""
    start = torch.rand(len(labels), 3, *size, generator=torch.Generator().manual_seed(SEED))
    images = start.to(task.device).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.02)
    samples = task.data_samples(labels, size)
    for _ in range(iterations):
        optimizer.zero_grad()
        (task.loss(images, samples) * len(labels)).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    pixels = images.detach() if task.channel_order == 'rgb' else images.detach().flip(1)
    return to_pixels(pixels.permute(0, 2, 3, 1).cpu().numpy())


def detections(task: Any, images: np.ndarray) -> list[InstanceData]:
    """Return what the teacher detects, with scores of at least that of a label that counts as found."""
    labels = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        pixels = pixels if task.channel_order == 'rgb' else pixels.flip(1)
        [found] = task.predict(pixels.to(task.device))
        kept = found.scores >= FOUND_SCORE
        labels.append(InstanceData(bboxes=found.bboxes[kept], labels=found.labels[kept]))
    return labels


def _parse_args() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('config')
    options.add_argument('--checkpoint', required=True)
    options.add_argument('--real', type=Path, metavar='DIR', help='folder of photographs (JPEG)')
    options.add_argument('--images', action='append', metavar='NAME=PATH', help='further set: images.npy or a folder')
    options.add_argument('--size', type=int, default=640, metavar='PIXELS')
    options.add_argument('--count', type=int, default=16, metavar='N', help='images of each set (default: 16)')
    options.add_argument('--adversarial', type=int, default=4, metavar='N', help='adversarial images (default: 4)')
    options.add_argument('--iterations', type=int, default=30, metavar='N', help='steps of adversarial images')
    options.add_argument('--out', type=Path, metavar='FILE')
    return options.parse_args()


if __name__ == '__main__':
    main()
