# SPDX-License-Identifier: Apache-2.0
"""Compare the labels of calibration sets with those of real images: categories, boxes an image, sizes of boxes.

    python tools/analysis_tools/label_statistics.py adaptive=work_dirs/a/calibration_set work_dirs/b/calibration_set \
        --annotations data/coco/annotations/instances_train2017.json --out statistics.json --plot statistics.png

A set is the folder of a calibration set or an annotation file of COCO's form, perhaps with a name before it. How alike
the histograms of categories are is told by two correlations over the categories (the paper's Figure 1b): Pearson's of
the numbers of boxes, Spearman's of their ranks. The file also has ``count_histogram`` and ``size_histogram`` as
``mmzsq.MultiBoxSampler`` takes them. Crowds and what is to be ignored are left out.
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
"""Areas in pixels by which COCO's evaluation tells sizes apart; the upper bound belongs to the next."""
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
SIZE_BINS = 40
MOST_NAMED = 100
"""More categories than these have no names in a plot."""


def main() -> None:
    """Parse the command line, read, compare, write."""
    options = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    options.add_argument('sets', nargs='+', metavar='SET', help='[NAME=]folder of a set, or annotation file')
    options.add_argument('--annotations', type=Path, required=True, help='annotation file of the real images (COCO)')
    options.add_argument('--out', type=Path, help='JSON file to write (default: standard output)')
    options.add_argument('--plot', type=Path, help='PNG file to write')
    args = options.parse_args()
    compared = compare(dict(named_path(text) for text in args.sets), args.annotations)
    cli.write_json(compared, args.out)
    if args.plot is not None:
        plot(compared).savefig(args.plot)


def named_path(text: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; a path alone is its own name."""
    name, equals, path = text.partition('=')
    return (name, Path(path)) if equals and not Path(text).exists() else (text, Path(text))


def compare(sets: Mapping[str, Path], annotations: Path) -> dict[str, Any]:
    """Describe sets and real annotations, and how alike their categories are.

    Args:
        sets: Folders of complete calibration sets, or annotation files, by name.
        annotations: Annotation file of the real images.

    Returns:
        ``annotations``: as :func:`describe`; ``sets``: the same by name, with ``correlation``.

    Raises:
        UserError: If a file is missing or no annotation file, or a set has other categories.
    """
    reference = describe(read_coco(annotations))
    described = {}
    for name, path in sets.items():
        found = describe(read_coco(path))
        unknown = [category for category in found['classes'] if category not in reference['classes']]
        if unknown:
            raise UserError(
                f'{path} has categories that {annotations} lacks ({", ".join(unknown[:3])}): give the annotations of '
                'the data set that the teacher was trained on'
            )
        found['correlation'] = correlation(
            [found['classes'].get(category, 0) for category in reference['classes']], [*reference['classes'].values()]
        )
        described[name] = found
    return dict(annotations=reference, sets=described)


def read_coco(path: Path) -> dict[str, Any]:
    """Read the annotations of a complete calibration set, or an annotation file.

    Returns:
        What the file holds, less crowds and what is to be ignored.

    Raises:
        UserError: If there is none, it is of another form, or it has no images.
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
        raise UserError(f'{path} is no annotation file of COCO ({error!r})') from error
    if not images:
        raise UserError(f'{path} has no images')
    return dict(images=images, annotations=kept, categories=categories)


def describe(coco: Mapping[str, Any]) -> dict[str, Any]:
    """Count what is in a data set.

    Args:
        coco: What an annotation file holds.

    Returns:
        What :func:`mmzsq.synthesis.coco_format.statistics` does, and ``box_sizes``: shares of the boxes that are small,
        medium and large for COCO, by their area in pixels of their image; ``size_quantiles``: of the boxes' sizes, a
        size being the square root of the box's share of its image; ``count_histogram``: images with one box, two, and
        so on; ``size_histogram``: boxes by size, in :data:`SIZE_BINS` bins of equal width over (0, 1].
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
    """How alike two histograms are.

    Returns:
        ``pearson`` of the values and ``spearman`` of their ranks, in [-1, 1]; None where a histogram is flat, of which
        neither is defined.
    """
    if len(set(first)) == 1 or len(set(second)) == 1:
        return dict(pearson=None, spearman=None)
    return dict(
        pearson=float(stats.pearsonr(first, second).statistic), spearman=float(stats.spearmanr(first, second).statistic)
    )


def plot(compared: Mapping[str, Any]) -> Figure:
    """Draw a column a set, with the real annotations in gray behind: categories, boxes an image, sizes of boxes.

    Args:
        compared: What :func:`compare` returns.
    """
    reference, sets = compared['annotations'], compared['sets']
    figure = Figure(figsize=(7 * len(sets), 10), dpi=100, layout='constrained')
    axes = figure.subplots(3, len(sets), sharey='row', squeeze=False)
    # The commonest first.
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
        counts.set_title(f'{mean:.1f} boxes an image, real images {real_mean:.1f}')
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
    """Two histograms as percentages, one over the other."""
    for values, options in (
        (reference, dict(fill=True, color='0.8', label='real')),
        (found, dict(color='tab:blue', label='set')),
    ):
        axes.stairs(100 * np.array(values) / max(sum(values), 1), edges, **options)


if __name__ == '__main__':
    cli.run(main)
