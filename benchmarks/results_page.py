# SPDX-License-Identifier: Apache-2.0
"""Write docs/results.md (the paper's tables with our numbers) and their summary in other pages, or check them.

    python benchmarks/results_page.py
    python benchmarks/results_page.py --check

``yolo_tables.py`` defines the tables and the method of each cell. ``yolo.py`` stores the result of a run as
``benchmarks/results/yolov5-n/METHOD_BITS_seedSEED.json``. Cells without a run are empty and listed below their table.
Runs whose settings differ from the current ones of their cell are shown and listed as well. The summary is
written to the pages of ``SUMMARY_PAGES`` between two lines:

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
    FORMER_VALUES,
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
SUMMARY_PAGES = ('README.md', 'docs/choosing.md')
BLOCK = re.compile(rf'(<!-- summary of {RESULTS} -->\n).*?(<!-- end of summary -->)', re.DOTALL)
LABELS = 'benchmarks/results/yolov5-n_labels.json'
SCORES = 'benchmarks/results/yolov5-n_scores.json'
RECONSTRUCTIONS = 'benchmarks/results/yolov5-n_reconstruction.json'
RECONSTRUCTION_PARTS = ('reconstruction', 'reconstruction, of one core')
"""Times of a reconstruction: by the clock, and of the processor."""
LABELS_PLOT = 'docs/images/yolov5-n/labels.png'
LABELS_OF = {row.cells[1].method: row.labels[1] for row in TABLES[5].rows}
"""Titles of the sets of ``default`` in Table 5."""
SHOWN = ('', '_prior', '_false-positives', '_multi-out', '_tile-out', '_real-labels')
"""Suffixes of the sets of ``default`` whose galleries are on the page."""
SIZES = ('small', 'medium', 'large')
NAME = re.compile(r'(?P<method>.+)_(?P<bits>w\da\d)_seed(?P<seed>\d+)')
NOT_COMPARED = (
    *('zsq.calibration_set.seed', 'zsq.calibration_set.dir', 'zsq.train.num_workers'),
    'zsq.calibration_set.real.data_root',
    # The weights of YOLOv5-n are smaller than the size that raises the rate, so it changes nothing here.
    'zsq.train.weight_size',
)
"""Settings by which runs of one cell may differ."""
ABSENT = 'absent'
"""Shown as the value of a setting that is newer than the run."""
NO_USE_FOR_REAL_IMAGES = (*(f'zsq.{part}.' for part in OF_SYNTHETIC_IMAGES), 'zsq.calibration_set.num_images')
"""Settings without effect on a run with real images."""
INTRODUCTION = """# Results on YOLOv5-n

The tables of the paper, "Zero-shot Quantization for Object Detection", with the numbers of this package on the
smallest YOLOv5, and two tables of our own. `python benchmarks/results_page.py` writes this page from the files in
[results](../benchmarks/results). [yolo_methods.py](../benchmarks/yolo_methods.py) defines the run of each cell;
`python benchmarks/yolo.py --tables 2 --list` prints the commands.

Numbers are AP / AP50 in percent on 200 images of COCO val2017, described in
[configs/zsq/README.md](../configs/zsq/README.md). With several seeds they are means ± half the range. On 200 images
AP has a sampling noise of a few points, which is the same in all rows, so compare rows with each other. **The columns
of the paper are for another detector, YOLOv5-s, on all 5000 images**: compare the order of the rows, not the values.
We evaluate the last checkpoint; the paper chooses a checkpoint on the validation images.

Calibration sets have 512 images; those of the paper have 2000. `paper` is a shortened version of the paper's recipe:
800 and 300 iterations instead of 2500 and 2500, and 192 training steps of batch 32. `default` is our recipe, with 640
training steps of batch 16. All rows of a preset take about the same number of steps unless stated otherwise. Rows on
real images or with labels of real images are not zero-shot and serve as a comparison. Strictly, the rows "in
distribution" are not zero-shot either. Two-stage detectors were measured on blood cells instead of COCO (Table 3 of
the paper), see [configs/zsq/README.md](../configs/zsq/README.md).
"""


@dataclass(frozen=True)
class Result:
    """One run of a method at a bit width.

    Attributes:
        seed: Seed of the calibration set and of training.
        content: Its ``results.json``.
        changed: Settings whose values differ from the current ones of the method, with the values of the run.
    """

    seed: int
    content: dict[str, Any]
    changed: dict[str, Any]


Runs = Mapping[tuple[str, str], Sequence[Result]]
"""Runs by method and bits, in order of their seeds."""


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
        text = render(runs, read_labels(args.root), read_scores(args.root), read_reconstructions(args.root))
        current = read_text(page) if page.is_file() else ''
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    renew(page, current, text, args.check, Path(__file__).name)
    for other in (args.root / name for name in SUMMARY_PAGES if (args.root / name).is_file()):
        before = read_text(other)
        after = BLOCK.sub(lambda block: f'{block[1]}\n{render_summary(runs)}\n\n{block[2]}', before)
        renew(other, before, after, args.check, Path(__file__).name)


def read_runs(root: Path) -> Runs:
    """Read the results in a repository.

    Args:
        root: Folder with ``configs/`` and ``benchmarks/results/``.

    Returns:
        Kept runs.

    Raises:
        UserError: If the name of a file does not match its content, if the runs of a cell differ in more than the seed,
            or if the teachers of all runs differ.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for path in sorted((root / RESULTS).glob('*.json')):
        match = NAME.fullmatch(path.stem)
        if match is None or match['method'] not in METHODS:
            raise UserError(f'{path} is not named METHOD_BITS_seedSEED.json with a method of yolo_methods.py')
        result = _result(path, match['method'], match['bits'], root)
        if result.seed != int(match['seed']):
            raise UserError(f'{path} holds a run with seed {result.seed}: rename it')
        found.setdefault((match['method'], match['bits']), []).append(result)
    for key, results in found.items():
        results.sort(key=lambda result: result.seed)
        if any(result.changed != results[0].changed for result in results):
            raise UserError(
                f'the runs of {key[0]} at {key[1]} differ in more than the seed: keep runs with the same settings'
            )
    contents = [result.content for results in found.values() for result in results]
    aps = [ap for ap, _ in accuracies(contents, 'float', BOX_METRICS)]
    if aps and max(aps) - min(aps) > SAME_TEACHER:
        raise UserError(
            f'the runs had different teachers, with AP from {min(aps):.3f} to {max(aps):.3f}: keep those of one teacher'
        )
    return found


def read_labels(root: Path) -> Mapping[str, Any] | None:
    """Read the output of label_statistics.py for the calibration sets; None if there is none."""
    path = root / LABELS
    return json.loads(read_text(path)) if path.is_file() else None


def read_scores(root: Path) -> Mapping[str, Any] | None:
    """Read the output of scores.py; None if there is none."""
    path = root / SCORES
    return json.loads(read_text(path)) if path.is_file() else None


def read_reconstructions(root: Path) -> Sequence[Mapping[str, Any]]:
    """Read the output of reconstruction.py, one entry for each run; empty if there is none."""
    path = root / RECONSTRUCTIONS
    return json.loads(read_text(path)) if path.is_file() else []


def render(
    runs: Runs,
    labels: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    reconstructions: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render the page.

    Args:
        runs: Returned by :func:`read_runs`.
        labels: Returned by :func:`read_labels`; None omits the section.
        scores: Returned by :func:`read_scores`; None omits the section.
        reconstructions: Returned by :func:`read_reconstructions`; if empty, the section is left out.
    """
    tables = (render_table(table, runs) for table in TABLES.values())
    parts = [
        render_reconstructions(reconstructions) if reconstructions else None,
        None if scores is None else render_scores(scores),
        None if labels is None else render_labels(labels),
    ]
    return '\n'.join([INTRODUCTION, *tables, *filter(None, parts)])


def render_reconstructions(found: Sequence[Mapping[str, Any]]) -> str:
    """Render post-training quantization with and without reconstruction."""
    rows = []
    for bits in (bits for bits in BITS if any(run['bits'] == bits for run in found)):
        of_bits = sorted((run for run in found if run['bits'] == bits), key=lambda run: run['seed'])

        def shown(row: str, of_bits: Sequence[Mapping[str, Any]] = of_bits) -> str:
            measured = [run['metrics'][row] for run in of_bits if row in run['metrics']]
            return means_with_spread([(ap['bbox_mAP'], ap['bbox_mAP_50']) for ap in measured])

        minutes = (statistics.mean(run['minutes'][part] for run in of_bits) for part in RECONSTRUCTION_PARTS)
        seeds = ', '.join(str(run['seed']) for run in of_bits)
        devices = ', '.join(dict.fromkeys(run['device'] for run in of_bits))
        times = (f'{value:.1f}' for value in minutes)
        rows.append([bits.upper(), shown('ptq'), shown('reconstructed'), *times, seeds, devices])
        changed = (f'{key.removeprefix("zsq.")}={value}' for key, value in of_bits[0]['options'].items())
        rows[-1].append(' '.join(f'`{text}`' for text in changed))
    head = ('bits', 'PTQ', 'PTQ with reconstruction', 'minutes', 'CPU minutes', 'seeds', 'device', 'settings (`zsq.`)')
    parts = (
        '## Post-training quantization with reconstruction',
        'Ours, not in the paper: `zsq.preset=reconstruct` on procedural pictures, without training, labels, or real '
        'images. Both students of a row start from the same steps. Minutes are those of the reconstruction, by the '
        'clock and of processor time; pictures and first steps take less than a minute. '
        'Two ingredients were tried and removed. Activations that stay float at random (QDrop) raised the error of a '
        'stage on other pictures from 0.18 to 0.21 at W4A8. Trained biases, and scales and shifts of BatchNorm, '
        'left it as it was (0.20 and 0.21).',
        markdown_table(head, rows),
        f'```bash\npython benchmarks/reconstruction.py {_reconstruction_options(found)}\n```',
    )
    return '\n\n'.join(parts) + '\n'


def _reconstruction_options(found: Sequence[Mapping[str, Any]]) -> str:
    bits = dict.fromkeys(run['bits'] for run in found)
    seeds = dict.fromkeys(str(run['seed']) for run in found)
    return f'--bits {" ".join(bits)} --seeds {" ".join(seeds)}'


def render_scores(scores: Mapping[str, Any]) -> str:
    """Render the scores of students beside those of their teacher, with and without an offset."""
    head = ('bits', 'offset of', 'offset', 'AP', 'shift', 'recall', 'precision', 'F1')
    teacher = scores['teacher']
    rows = [['full precision', '', '', f'{100 * teacher["AP"]:.1f}', '', *_rates(teacher)]]
    for bits, variants in scores['students'].items():
        for variant, entry in variants.items():
            values = [f'{entry[key]:+.2f}' for key in ('objectness', 'classes') if entry[key]]
            ap = f'{100 * entry["AP"]:.1f}' if 'AP' in entry else ''
            name = '' if variant == 'none' else variant
            rows.append([bits.upper(), name, ' and '.join(values), ap, f'{entry["shift"][1]:+.3f}', *_rates(entry)])
    parts = (
        '## Scores',
        'Scores of students beside those of their teacher, with one seed. Shift: the median of the score minus the '
        "teacher's, over the objects that both find. Recall, precision and F1: at the teacher's best threshold, "
        f'{scores["threshold"]:.2f}, on {scores["evaluation_images"]} images. Offsets of the logits are measured on '
        f'{scores["synthetic_images"]} synthetic images, without labels, so that the mean scores of teacher and '
        'student agree. That of the objectness is the one of `tools/model_converters/calibrate_scores.py`.',
        'At W4A4 it brings the shift from -0.17 to zero, and recall and F1 toward those of the teacher. At W4A8 '
        'and W6A6 it trades precision for recall at nearly equal F1. An offset of the class logits moves scores less, '
        'and at W4A4 it costs F1, because it also raises the classes that an object does not have. Offsets '
        'for each class, shrunk '
        'toward the common one where a class is rare, add nothing to it. At 8 bits there is nothing to correct, and '
        'the offset is too large: synthetic images are made so that the teacher is confident, and the student is a '
        'little less so on them. The offset is therefore no default. One detector and one seed were measured.',
        markdown_table(head, rows),
        f'```bash\n{scores["command"]}\n```',
    )
    return '\n\n'.join(parts) + '\n'


def _rates(row: Mapping[str, Any]) -> list[str]:
    recall, precision = row['recall'], row['precision']
    return [f'{value:.3f}' for value in (recall, precision, 2 * recall * precision / (recall + precision))]


def render_summary(runs: Runs) -> str:
    """Render the AP of the rows of ``SUMMARY`` in percent."""

    def ap(cell: Cell) -> str:
        measured = _accuracies(cell, runs)
        return f'{100 * _mean(measured)[0]:.1f}' if measured else ''

    rows = [
        [text, *(ap(Cell(methods[bits], bits, metric)) if bits in methods else '' for bits in BITS)]
        for text, metric, methods in SUMMARY
    ]
    return markdown_table(['', *map(str.upper, BITS)], rows)


def render_labels(labels: Mapping[str, Any]) -> str:
    """Render the comparison of the labels of calibration sets with those of real images."""
    head = ('labels', 'images', 'boxes per image', *(f'{size} boxes' for size in SIZES), 'Pearson', 'Spearman')
    rows = [[LABELS_OF.get(name, f'`{name}`'), *_label_numbers(of_set)] for name, of_set in labels['sets'].items()]
    rows.append(['real, train2017', *_label_numbers(labels['annotations'])])
    sets = ' '.join(f'{name}=work_dirs/yolov5-n/set_{name}_seed0/calibration_set' for name in labels['sets'])
    command = (
        f'python tools/analysis_tools/label_statistics.py {sets} \\\n'
        f'    --annotations data/coco/annotations/instances_train2017.json --out {LABELS} --plot {LABELS_PLOT}'
    )
    parts = (
        '## Labels',
        'Labels of the sets of Table 5 (seed 0) compared with those of the real training images, as in Figure 1b '
        'of the paper: Pearson correlation of the box counts of the 80 categories, and Spearman correlation of '
        'their ranks. Small boxes are below 32 x 32 pixels, large boxes at least 96 x 96. Labels of MultiSample '
        'and Tile are not corrected during synthesis.',
        markdown_table(head, rows),
        f'```bash\n{command}\n```',
        f'![Categories, boxes per image, sizes of boxes]({Path(LABELS_PLOT).relative_to("docs")})',
        'The first images of each set of Table 5 with their labels, in order and without selection.',
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
    """Render one table of the page, with the settings of its runs."""
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
        head = (
            'run',
            'bits',
            'images',
            'boxes per image',
            'synthesis: side x iterations',
            'QAT steps x batch',
            'seeds',
        )
        times = ('synthesis, minutes', 'training and evaluation, minutes', 'evaluated on', 'device')
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
    """Format the accuracy of a cell, marked if its runs had other settings."""
    text = means_with_spread(_accuracies(cell, runs))
    return f'{text} *' if text and _otherwise(runs.get((cell.method, cell.bits), ())) else text


def _teacher_of(cell: Cell) -> Cell:
    return Cell(cell.method, cell.bits, 'float')


def _accuracies(cell: Cell, runs: Runs) -> list[list[float]]:
    """Return AP and AP50 of each evaluated run, in [0, 1]."""
    contents = [result.content for result in runs.get((cell.method, cell.bits), ())]
    return accuracies(contents, cell.metric, BOX_METRICS)


def _mean(measured: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*measured, strict=True)]


def _missing(table: Table, runs: Runs) -> Iterator[str]:
    cells = [cell for row in table.rows for cell in row.cells]
    missing = dict.fromkeys((cell.method, cell.bits) for cell in cells if not _accuracies(cell, runs))
    if len(missing) == len(table.runs):
        yield 'No run yet: all of our columns are empty.'
        return
    if missing:
        yield f'Not run, therefore empty: {_by_method(missing, table)}.'


def _by_method(runs: Iterable[tuple[str, str]], table: Table) -> str:
    """List methods, with their bits unless these are all bits of the method in the table."""
    found: dict[str, list[str]] = {}
    for method, bits in runs:
        found.setdefault(method, []).append(bits)
    texts = []
    for method, widths in found.items():
        whole = set(widths) == {bits for known, bits in table.runs if known == method}
        texts.append(f'`{method}`' + ('' if whole else f' ({", ".join(widths).upper()})'))
    return ', '.join(texts)


def _how(runs: Runs) -> Iterator[list[str]]:
    """Yield one row per method with the settings of its runs."""
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
    """Yield notes on runs whose settings differ from the current ones of their cells."""
    by_settings: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, found in runs.items():
        settings = ', '.join(f'{name}={value}' for name, value in found[0].changed.items())
        start = 'Marked *, run' if _otherwise(found) else 'Run'
        by_settings.setdefault((start, settings), []).append(key)
    for (start, settings), keys in by_settings.items():
        if settings:
            yield f'{start} with settings that have changed since: {_by_method(keys, table)}: `{settings}`.'


def _otherwise(results: Iterable[Result]) -> bool:
    """Return whether a setting of a run has changed since; settings that were added later do not count."""
    return any(value != ABSENT for result in results for value in result.changed.values())


def _result(path: Path, method: str, bits: str, root: Path) -> Result:
    content = read_results(path)
    config, _ = METHODS[method].config_for(bits)
    quantizer = content['quantizer']
    held = (repository_path(content['config'], root), f'w{quantizer["w_bits"]}a{quantizer["a_bits"]}')
    if held != (config, bits):
        raise UserError(f'{path} holds {held[0]} at {held[1]}, not {config} at {bits}: remove it')
    recorded = settings_of(content)
    current = _settings(method, bits, root)
    for key, value in FORMER_VALUES.items():
        section, name = key.split('.')
        # 'auto' is 'synthesized' for detectors with a feature prior, as that of this page.
        same = (value, 'auto') if name == 'source' else (value,)
        if isinstance(current.get(section), dict) and current[section].get(name) in same:
            current[section].pop(name, None)
            recorded.get(section, {}).pop(name, None)
    # Settings of later versions count unless they are switched off.
    added = {key: ABSENT for key, value in differences(current, recorded, 'zsq') if value}
    changed = {**added, **dict(differences(recorded, current, 'zsq'))}
    skipped = NOT_COMPARED if METHODS[method].images is not None else (*NOT_COMPARED, *NO_USE_FOR_REAL_IMAGES)
    return Result(
        seed_of(content),
        content,
        {key: value for key, value in changed.items() if not key.startswith(skipped)},
    )


def _settings(method: str, bits: str, root: Path) -> dict[str, Any]:
    """Return the current ``zsq`` section of a method, in the types of JSON."""
    recipe = METHODS[method]
    config, _ = recipe.config_for(bits)
    cfg = copy.deepcopy(_config(root / config))
    cfg.merge_from_dict(dict(student_options(recipe, bits)))
    return json.loads(json.dumps(complete_section(cfg.zsq.to_dict())))


@cache
def _config(path: Path) -> Config:
    return Config.fromfile(path)


if __name__ == '__main__':
    main()
