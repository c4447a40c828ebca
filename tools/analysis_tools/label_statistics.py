# SPDX-License-Identifier: Apache-2.0
"""Compare labels of calibration sets with those of real images: categories, boxes per image, sizes of boxes.

    python tools/analysis_tools/label_statistics.py adaptive=work_dirs/a/calibration_set work_dirs/b/calibration_set \
        --annotations data/coco/annotations/instances_train2017.json --out statistics.json --plot statistics.png

A set is the folder of a calibration set or a COCO annotation file, optionally with a name. Two correlations over the
categories compare the histograms of categories, as in Figure 1b of the paper: Pearson's of the numbers of boxes and
Spearman's of their ranks. The output also holds ``count_histogram`` and ``size_histogram``, which
``mmzsq.MultiBoxSampler`` takes as arguments. Crowds and ignored objects are left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from mmzsq import cli
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet
from mmzsq.synthesis.coco_format import statistics

COCO_SIZES = {'small': (0, 32**2), 'medium': (32**2, 96**2), 'large': (96**2, math.inf)}
"""Ranges of box area in pixels for the size classes of COCO's evaluation, without the upper bound."""
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
SIZE_BINS = 40
MOST_NAMED = 100
"""Largest number of categories that are named in a plot."""


def main() -> None:
    """Parse the command line, read, compare, write."""
    options = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    options.add_argument('sets', nargs='+', metavar='SET', help='[NAME=]folder of a calibration set or annotation file')
    options.add_argument('--annotations', type=Path, required=True, help='COCO annotation file of the real images')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    options.add_argument('--plot', type=Path, help='PNG file to write')
    args = options.parse_args()
    compared = compare(dict(named_path(text) for text in args.sets), args.annotations)
    cli.write_json(compared, args.out)
    if args.plot is not None:
        plot(compared).savefig(args.plot)


def named_path(text: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; without a name, the path is the name."""
    name, equals, path = text.partition('=')
    return (name, Path(path)) if equals and not Path(text).exists() else (text, Path(text))


def compare(sets: Mapping[str, Path], annotations: Path) -> dict[str, Any]:
    """Describe sets and real annotations, and correlate their categories.

    Args:
        sets: Folders of complete calibration sets, or annotation files, by name.
        annotations: Annotation file of the real images.

    Returns:
        ``annotations``: as :func:`describe`; ``sets``: the same by name, with ``correlation``.

    Raises:
        UserError: If a file is missing or is not an annotation file, or if a set has unknown categories.
    """
    reference = describe(read_coco(annotations))
    described = {}
    for name, path in sets.items():
        found = describe(read_coco(path))
        unknown = [category for category in found['classes'] if category not in reference['classes']]
        if unknown:
            raise UserError(
                f'{path} has categories that are missing in {annotations} ({", ".join(unknown[:3])}): give the '
                'annotations of the data set that the teacher was trained on'
            )
        found['correlation'] = correlation(
            [found['classes'].get(category, 0) for category in reference['classes']], [*reference['classes'].values()]
        )
        described[name] = found
    return dict(annotations=reference, sets=described)


def read_coco(path: Path) -> dict[str, Any]:
    """Read the annotations of a complete calibration set, or an annotation file.

    Returns:
        ``images``, ``annotations`` without crowds and ignored objects, and ``categories``.

    Raises:
        UserError: If the file is missing, is not a COCO annotation file, or has no images.
    """
    if path.is_dir():
        path = CalibrationSet.load(path).root / 'annotations' / 'instances.json'
    try:
        coco = json.loads(path.read_bytes())
        kept = [found for found in coco['annotations'] if not found.get('iscrowd') and not found.get('ignore')]
        images, categories = coco['images'], coco['categories']
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is not a COCO annotation file ({error!r})') from error
    if not images:
        raise UserError(f'{path} has no images')
    return dict(images=images, annotations=kept, categories=categories)


def describe(coco: Mapping[str, Any]) -> dict[str, Any]:
    """Compute statistics of the boxes of a data set.

    Args:
        coco: Returned by :func:`read_coco`.

    Returns:
        The entries of :func:`mmzsq.synthesis.coco_format.statistics`, and ``box_sizes``: shares of small, medium and
        large boxes by COCO's definition, by area in pixels of their image; ``size_quantiles``: quantiles of the size of
        boxes, which is the square root of the box's share of its image; ``count_histogram``: number of images with 1,
        2, ... boxes; ``size_histogram``: number of boxes by size, in :data:`SIZE_BINS` bins of equal width over (0, 1].
    """
    areas = np.array([found['bbox'][2] * found['bbox'][3] for found in coco['annotations']], dtype=float)
    pixels = {image['id']: image['width'] * image['height'] for image in coco['images']}
    sizes = np.sqrt(areas / np.array([pixels[found['image_id']] for found in coco['annotations']], dtype=float))
    bins = Counter(np.clip(np.ceil(sizes * SIZE_BINS), 1, SIZE_BINS).astype(int).tolist())
    counted = statistics(dict(coco))
    images_with = counted['boxes_per_image']['histogram']
    return dict(
        counted,
        box_sizes={
            name: float(np.mean((areas >= low) & (areas < high))) if len(areas) else 0.0
            for name, (low, high) in COCO_SIZES.items()
        },
        size_quantiles={f'{share:g}': float(np.quantile(sizes, share)) for share in QUANTILES if len(sizes)},
        count_histogram=[images_with.get(str(n), 0) for n in range(1, counted['boxes_per_image']['max'] + 1)],
        size_histogram=[bins[index] for index in range(1, SIZE_BINS + 1)],
    )


def correlation(first: Sequence[int], second: Sequence[int]) -> dict[str, float | None]:
    """Correlate two histograms.

    Args:
        first: Counts by bin.
        second: Counts of the other histogram, in the same bins.

    Returns:
        ``pearson`` of the values and ``spearman`` of their ranks, in [-1, 1]; both None if a histogram is flat, where
        they are undefined.
    """
    if len(set(first)) == 1 or len(set(second)) == 1:
        return dict(pearson=None, spearman=None)
    return dict(
        pearson=float(stats.pearsonr(first, second).statistic), spearman=float(stats.spearmanr(first, second).statistic)
    )


def plot(compared: Mapping[str, Any]) -> Figure:
    """Plot one column per set over the real annotations in gray: categories, boxes per image, sizes of boxes.

    Args:
        compared: Returned by :func:`compare`.
    """
    reference, sets = compared['annotations'], compared['sets']
    figure = Figure(figsize=(7 * len(sets), 10), dpi=100, layout='constrained')
    axes = figure.subplots(3, len(sets), sharey='row', squeeze=False)
    # Most frequent categories first.
    order = sorted(reference['classes'], key=lambda category: -reference['classes'][category])
    last = max(len(found['count_histogram']) for found in (reference, *sets.values()))
    for column, (name, found) in zip(axes.T, sets.items(), strict=True):
        categories, counts, sizes = column
        correlated = ', '.join(
            f'{kind.capitalize()} {"undefined" if value is None else f"{value:.2f}"}'
            for kind, value in found['correlation'].items()
        )
        categories.set_title(f'{name}: {found["images"]} images\n{correlated}')
        _draw(
            *(categories, np.arange(len(order) + 1) - 0.5),
            *([of['classes'].get(category, 0) for category in order] for of in (reference, found)),
        )
        categories.set_ylabel('% of boxes')
        named = order if len(order) <= MOST_NAMED else []
        categories.set_xticks(range(len(named)), named, rotation=90, fontsize=6)
        mean, real_mean = (of['boxes_per_image']['mean'] for of in (found, reference))
        counts.set_title(f'{mean:.1f} boxes per image, real images {real_mean:.1f}')
        _draw(
            *(counts, np.arange(last + 2) - 0.5),
            *(
                [of['boxes_per_image']['histogram'].get(str(n), 0) for n in range(last + 1)]
                for of in (reference, found)
            ),
        )
        counts.set(xlabel='boxes', ylabel='% of images')
        shares, real_shares = (
            '/'.join(f'{100 * n:.0f}' for n in of['box_sizes'].values()) for of in (found, reference)
        )
        sizes.set_title(f'small/medium/large {shares} %, of real boxes {real_shares} %')
        edges = np.linspace(0, 1, SIZE_BINS + 1)
        _draw(sizes, edges, reference['size_histogram'], found['size_histogram'])
        sizes.set(xlabel='square root of the share of the image', ylabel='% of boxes')
        sizes.legend()
    return figure


def _draw(axes: Axes, edges: np.ndarray, reference: Sequence[int], found: Sequence[int]) -> None:
    """Draw two histograms as percentages on top of each other."""
    for values, options in (
        (reference, dict(fill=True, color='0.8', label='real')),
        (found, dict(color='tab:blue', label='set')),
    ):
        axes.stairs(100 * np.array(values) / max(sum(values), 1), edges, **options)


if __name__ == '__main__':
    cli.run(main)
