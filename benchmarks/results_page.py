# SPDX-License-Identifier: Apache-2.0
"""Write docs/results.md, the paper's tables with our numbers, and the summary in README.md, or check them.

    python benchmarks/results_page.py
    python benchmarks/results_page.py --check

``yolo_tables.py`` defines the tables and the method of each cell. ``yolo.py`` stores the result of a run as
``benchmarks/results/yolov5-n/METHOD_BITS_seedSEED.json``. Cells without a run are empty and listed below their table.
Runs whose settings differ from the current ones of their cell are shown and listed as well. The summary of README.md
is written between two lines:

    <!-- summary of benchmarks/results/yolov5-n -->
    <!-- end of summary -->
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kept_runs import (
    BOX_METRICS,
    OF_SYNTHETIC_IMAGES,
    SAME_TEACHER,
    accuracies,
    differences,
    read_results,
    repository_path,
    seed_of,
    settings_of,
    synthesis_text,
    training_text,
)
from markdown_pages import ROOT, markdown_table, means_with_spread, read_text, renew
from mmengine.config import Config
from yolo_methods import BITS, METHODS, student_options
from yolo_tables import SUMMARY, TABLES, Cell, Row, Table

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError

PAGE = 'docs/results.md'
RESULTS = 'benchmarks/results/yolov5-n'
README = 'README.md'
BLOCK = re.compile(rf'(<!-- summary of {RESULTS} -->\n).*?(<!-- end of summary -->)', re.DOTALL)
LABELS = 'benchmarks/results/yolov5-n_labels.json'
LABELS_PLOT = 'docs/images/yolov5-n/labels.png'
LABELS_OF = {row.cells[1].method: row.labels[1] for row in TABLES[5].rows}
"""What Table 5 calls the sets of ``default``."""
SHOWN = ('', '_prior', '_false-positives', '_multi-out', '_tile-out', '_real-labels')
"""Sets of ``default`` whose galleries are on the page, by the end of their names."""
SIZES = ('small', 'medium', 'large')
NAME = re.compile(r'(?P<method>.+)_(?P<bits>w\da\d)_seed(?P<seed>\d+)')
NOT_COMPARED = (
    *('zsq.calibration_set.seed', 'zsq.calibration_set.dir', 'zsq.train.num_workers'),
    'zsq.calibration_set.real.data_root',
)
"""Settings by which runs of one cell may differ."""
ABSENT = 'absent'
"""What a run is said to have of a setting that came after it."""
NO_USE_FOR_REAL_IMAGES = (*(f'zsq.{part}.' for part in OF_SYNTHETIC_IMAGES), 'zsq.calibration_set.num_images')
"""Settings that do not count in a run on real images."""
INTRODUCTION = """# Results on YOLOv5-n

The tables of the paper, "Zero-shot Quantization for Object Detection", with the numbers of this package on the smallest
YOLOv5, and two of our own. This page is written by `python benchmarks/results_page.py` from the files
in [results](../benchmarks/results). What is run for a cell stands in
[yolo_methods.py](../benchmarks/yolo_methods.py), and `python benchmarks/yolo.py --tables 2 --list` prints it as
commands.

Numbers are AP / AP50 in percent on 200 images of COCO val2017, described in
[configs/zsq/README.md](../configs/zsq/README.md): means over the seeds, ± half the range between them where there are
several. On so few images AP carries a few points of sampling noise, the same in all rows: compare rows. **The columns
of the paper are of another detector, YOLOv5-s, on all 5000 images**: they stand beside ours for the order of the rows,
not for their height. The checkpoint evaluated is the last one, where the paper's is chosen on the validation images.

Calibration sets have 512 images, where the paper has 2000. `paper` is the paper's recipe cut short (800 and 300
iterations in place of 2500 and 2500, 192 steps of training at batch 32), `default` ours (640 steps at batch 16); within
a preset all rows take about as many steps, unless they say otherwise. Rows on real images or with labels of real images
are for comparison and not zero-shot, nor are those "in distribution" to the letter. Two-stage detectors, on blood cells
and not the paper's COCO (its Table 3), are in [configs/zsq/README.md](../configs/zsq/README.md).
"""


@dataclass(frozen=True)
class Result:
    """One run of a method at a bit width.

    Attributes:
        seed: Of its calibration set and its training.
        content: What it wrote.
        changed: Settings that are otherwise in the method as it is now, with the values of the run.
    """

    seed: int
    content: dict[str, Any]
    changed: dict[str, Any]


Runs = Mapping[tuple[str, str], Sequence[Result]]
"""By method and bits, by rising seed."""


def main() -> None:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the page is not up to date')
    parser.add_argument(
        '--root',
        type=Path,
        default=ROOT,
        help='folder with configs/, benchmarks/results/ and docs/ (default: this repository)',
    )
    args = parser.parse_args()
    page = args.root / PAGE
    try:
        runs = read_runs(args.root)
        text = render(runs, read_labels(args.root))
        current, readme = (read_text(path) if path.is_file() else '' for path in (page, args.root / README))
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    renew(page, current, text, args.check, Path(__file__).name)
    summary = BLOCK.sub(lambda block: f'{block[1]}\n{render_summary(runs)}\n\n{block[2]}', readme)
    renew(args.root / README, readme, summary, args.check, Path(__file__).name)


def read_runs(root: Path) -> Runs:
    """Read the results in a repository.

    Args:
        root: Folder with ``configs/`` and ``benchmarks/results/``.

    Returns:
        Kept runs.

    Raises:
        UserError: If a file is not named after what it holds, or the runs of a cell differ in more than the seed, or
            their teachers do.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for path in sorted((root / RESULTS).glob('*.json')):
        match = NAME.fullmatch(path.stem)
        if match is None or match['method'] not in METHODS:
            raise UserError(f'{path} is not named METHOD_BITS_seedSEED.json, with a method of yolo_methods.py')
        result = _result(path, match['method'], match['bits'], root)
        if result.seed != int(match['seed']):
            raise UserError(f'{path} holds a run with the seed {result.seed}: name it so')
        found.setdefault((match['method'], match['bits']), []).append(result)
    for key, results in found.items():
        results.sort(key=lambda result: result.seed)
        if any(result.changed != results[0].changed for result in results):
            raise UserError(f'the runs of {key[0]} at {key[1]} differ in more than the seed: keep those that are alike')
    contents = [result.content for results in found.values() for result in results]
    aps = [ap for ap, _ in accuracies(contents, 'float', BOX_METRICS)]
    if aps and max(aps) - min(aps) > SAME_TEACHER:
        raise UserError(
            f'the runs had different teachers: their AP is from {min(aps):.3f} to {max(aps):.3f}; keep those of one'
        )
    return found


def read_labels(root: Path) -> Mapping[str, Any] | None:
    """What label_statistics.py wrote of the calibration sets; None if it has not."""
    path = root / LABELS
    return json.loads(read_text(path)) if path.is_file() else None


def render(runs: Runs, labels: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        runs: Of :func:`read_runs`.
        labels: Of :func:`read_labels`; None leaves the section out.
    """
    tables = (render_table(table, runs) for table in TABLES.values())
    return '\n'.join([INTRODUCTION, *tables, *([] if labels is None else [render_labels(labels)])])


def render_summary(runs: Runs) -> str:
    """AP of the rows of ``SUMMARY``, in percent, as markdown."""

    def ap(cell: Cell) -> str:
        measured = _accuracies(cell, runs)
        return f'{100 * _mean(measured)[0]:.1f}' if measured else ''

    rows = [['full precision', *[ap(Cell('default', BITS[0], 'float'))] * len(BITS)]]
    for text, methods in SUMMARY:
        rows.append([text, *(ap(Cell(methods[bits], bits)) if bits in methods else '' for bits in BITS)])
    return markdown_table(['', *map(str.upper, BITS)], rows)


def render_labels(labels: Mapping[str, Any]) -> str:
    """How alike the labels of calibration sets and of real images are, as markdown."""
    head = ('labels', 'images', 'boxes an image', *(f'{size} boxes' for size in SIZES), 'Pearson', 'Spearman')
    rows = [[LABELS_OF.get(name, f'`{name}`'), *_label_numbers(of_set)] for name, of_set in labels['sets'].items()]
    rows.append(['real, train2017', *_label_numbers(labels['annotations'])])
    sets = ' '.join(f'{name}=work_dirs/yolov5-n/set_{name}_seed0/calibration_set' for name in labels['sets'])
    command = (
        f'python tools/analysis_tools/label_statistics.py {sets} \\\n'
        f'    --annotations data/coco/annotations/instances_train2017.json --out {LABELS} --plot {LABELS_PLOT}'
    )
    parts = (
        '## Labels',
        "The labels of sets of Table 5 (seed 0) beside those of the real training images, as in the paper's Figure 1b: "
        "correlation of the numbers of boxes of the 80 categories, Pearson's, and of their ranks, Spearman's. Small is "
        'below 32 x 32 pixels, large from 96 x 96 on. Nothing corrects those of MultiSample and Tile.',
        markdown_table(head, rows),
        f'```bash\n{command}\n```',
        f'![Categories, boxes an image, sizes of boxes]({Path(LABELS_PLOT).relative_to("docs")})',
        'The first images of sets of Table 5 by index, none left out, with their labels.',
        *(_gallery(f'default{end}') for end in SHOWN),
    )
    return '\n\n'.join(parts) + '\n'


def _gallery(name: str) -> str:
    text = LABELS_OF[name]
    return f'{text[0].upper()}{text[1:]}:\n\n![{text}, with its labels](images/yolov5-n/set_{name}_seed0.jpg)'


def _label_numbers(statistics_of: Mapping[str, Any]) -> list[str]:
    correlation = statistics_of.get('correlation', {})
    return [
        str(statistics_of['images']),
        f'{statistics_of["boxes_per_image"]["mean"]:.1f}',
        *(f'{100 * statistics_of["box_sizes"][size]:.0f} %' for size in SIZES),
        *(f'{correlation[kind]:.2f}' if kind in correlation else '' for kind in ('pearson', 'spearman')),
    ]


def render_table(table: Table, runs: Runs) -> str:
    """One table of the page, with what has to be known of its runs, as markdown."""
    header = [*table.heads, *table.columns, *(['share of the teacher'] if table.share else []), *table.paper]
    rows = [_row(row, runs, table.share) for row in table.rows]
    here = {key: runs[key] for key in table.runs if key in runs}
    parts = [
        f'## Table {table.number}: {table.title}',
        markdown_table(header, rows),
        table.note,
        *_missing(table, runs),
    ]
    seeds = sorted({result.seed for results in here.values() for result in results}) or [0, 1]
    command = f'python benchmarks/yolo.py --tables {table.number} --seeds {" ".join(map(str, seeds))}'
    parts.append(f'```bash\n{command}\n```')
    if here:
        head = ('run', 'bits', 'images', 'boxes an image', 'synthesis: side x iterations', 'QAT steps x batch', 'seeds')
        times = ('minutes of the set', 'minutes of training and evaluation', 'evaluated on', 'device')
        parts.append(markdown_table([*head, *times], _how(here)))
    parts.extend(_of_other_settings(here, table))
    return '\n\n'.join(parts) + '\n'


def _row(row: Row, runs: Runs, share: bool) -> list[str]:
    shares = []
    if share:
        measured, teacher = (_accuracies(cell, runs) for cell in (row.cells[0], _teacher_of(row.cells[0])))
        shares = [f'{100 * _mean(measured)[0] / _mean(teacher)[0]:.1f} %' if measured and teacher else '']
    return [*row.labels, *(_cell(cell, runs) for cell in row.cells), *shares, *row.paper]


def _cell(cell: Cell, runs: Runs) -> str:
    """Accuracy, marked where it is of other settings than the cell's."""
    text = means_with_spread(_accuracies(cell, runs))
    return f'{text} *' if text and _otherwise(runs.get((cell.method, cell.bits), ())) else text


def _teacher_of(cell: Cell) -> Cell:
    return Cell(cell.method, cell.bits, 'float')


def _accuracies(cell: Cell, runs: Runs) -> list[list[float]]:
    """AP and AP50 of each run that was evaluated, in [0, 1]."""
    contents = [result.content for result in runs.get((cell.method, cell.bits), ())]
    return accuracies(contents, cell.metric, BOX_METRICS)


def _mean(measured: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*measured, strict=True)]


def _missing(table: Table, runs: Runs) -> Iterator[str]:
    cells = [cell for row in table.rows for cell in row.cells]
    missing = dict.fromkeys((cell.method, cell.bits) for cell in cells if not _accuracies(cell, runs))
    if len(missing) == len(table.runs):
        yield 'Nothing of it has been run yet, therefore all of our columns are empty.'
        return
    if missing:
        yield f'Not run, therefore empty: {_by_method(missing, table)}.'


def _by_method(runs: Iterable[tuple[str, str]], table: Table) -> str:
    """Name methods, with their bits where these are not all that the table has of them."""
    found: dict[str, list[str]] = {}
    for method, bits in runs:
        found.setdefault(method, []).append(bits)
    texts = []
    for method, widths in found.items():
        whole = set(widths) == {bits for known, bits in table.runs if known == method}
        texts.append(f'`{method}`' + ('' if whole else f' ({", ".join(widths).upper()})'))
    return ', '.join(texts)


def _how(runs: Runs) -> Iterator[list[str]]:
    """How the runs of each method were made, one row a method."""
    for method in dict.fromkeys(method for method, _ in runs):
        results = [result for key, found in runs.items() if key[0] == method for result in found]
        contents = [result.content for result in results]
        first = contents[0]
        measured = first['calibration_set']['statistics']
        boxes = [_boxes(content) for content in contents]
        sets = [sum(stage['seconds'] for stage in c['calibration_set']['stages'].values()) for c in contents]
        training = [sum(content['seconds'].values()) for content in contents]
        synthetic = not measured.get('real')
        yield [
            f'`{method}`',
            ', '.join(bits.upper() for found, bits in runs if found == method),
            f'{measured["images"]} {"synthetic" if synthetic else "real"}',
            f'{statistics.mean(filter(None, boxes)):.1f}' if any(boxes) else '',
            synthesis_text(first),
            _distinct(training_text(content) for content in contents),
            _distinct(str(seed) for seed in sorted({result.seed for result in results})),
            f'{statistics.mean(sets) / 60:.1f}' if synthetic else '',
            f'{statistics.mean(training) / 60:.1f}',
            f'{_distinct(str(content["evaluation_images"]) for content in contents)} images',
            _distinct(content['device'] for content in contents),
        ]


def _boxes(results: Mapping[str, Any]) -> float | None:
    found = results['calibration_set']['statistics'].get('boxes_per_image')
    return None if found is None else found['mean']


def _distinct(texts: Iterable[str]) -> str:
    return ', '.join(dict.fromkeys(texts))


def _of_other_settings(runs: Runs, table: Table) -> Iterator[str]:
    """Runs that were made otherwise than their cells say now."""
    by_settings: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, found in runs.items():
        settings = ', '.join(f'{name}={value}' for name, value in found[0].changed.items())
        start = 'Marked *, run' if _otherwise(found) else 'Run'
        by_settings.setdefault((start, settings), []).append(key)
    for (start, settings), keys in by_settings.items():
        if settings:
            yield f'{start} with settings that are otherwise now: {_by_method(keys, table)}: `{settings}`.'


def _otherwise(results: Iterable[Result]) -> bool:
    """Whether a run has a setting that is otherwise now, and not only lacks a later one."""
    return any(value != ABSENT for result in results for value in result.changed.values())


def _result(path: Path, method: str, bits: str, root: Path) -> Result:
    content = read_results(path)
    config, _ = METHODS[method].config_for(bits)
    quantizer = content['quantizer']
    held = (repository_path(content['config'], root), f'w{quantizer["w_bits"]}a{quantizer["a_bits"]}')
    if held != (config, bits):
        raise UserError(f'{path} holds {held[0]} at {held[1]}, not {config} at {bits}: move it away')
    recorded = settings_of(content)
    current = _settings(method, bits, root)
    # Settings of later versions, unless they are switched off.
    added = {key: ABSENT for key, value in differences(current, recorded, 'zsq') if value}
    changed = {**added, **dict(differences(recorded, current, 'zsq'))}
    skipped = NOT_COMPARED if METHODS[method].images is not None else (*NOT_COMPARED, *NO_USE_FOR_REAL_IMAGES)
    return Result(
        seed_of(content),
        content,
        {key: value for key, value in changed.items() if not key.startswith(skipped)},
    )


def _settings(method: str, bits: str, root: Path) -> dict[str, Any]:
    """The ``zsq`` section of a method as it is now, in JSON's types."""
    recipe = METHODS[method]
    config, _ = recipe.config_for(bits)
    cfg = copy.deepcopy(_config(root / config))
    cfg.merge_from_dict(dict(student_options(recipe, bits)))
    return json.loads(json.dumps(complete_section(cfg.zsq.to_dict(), cfg.get('model'))))


@cache
def _config(path: Path) -> Config:
    return Config.fromfile(path)


if __name__ == '__main__':
    main()
