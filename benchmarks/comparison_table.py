# SPDX-License-Identifier: Apache-2.0
"""Comparison of zero-shot quantization with quantization on real images, a table of ``results_table.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept_runs import (
    BOX_METRICS,
    LEAF,
    OTHER_SEEDS,
    SAME_TEACHER,
    Row,
    accuracies,
    bits_of,
    command,
    leaf_name,
    order,
    read_results,
    repository_path,
    row_of,
    seed_of,
    synthesis_text,
    training_text,
)
from markdown_pages import markdown_table, means_with_spread

from mmzsq.errors import UserError

COMPARED = {
    'PTQ on synthetic': ('', 'ptq'),
    'zero-shot QAT': ('', 'zero_shot'),
    'LSQ on real': ('_lsq-real', 'zero_shot'),
    'LSQ on real + distillation': ('_lsq-real-distil', 'zero_shot'),
}
"""Columns of a comparison: suffix of the config in ``comparison/`` (empty: the leaf itself) and accuracy to show."""
COMPARED_METRICS = (*BOX_METRICS, 'coco/segm_mAP')


@dataclass(frozen=True)
class Comparison:
    """A zero-shot config and the configs that it is compared with.

    Attributes:
        leaf: Path of the zero-shot config in the repository.
        rows: Rows by suffix of the config, see :data:`COMPARED`; a row without runs was not run.
    """

    leaf: str
    rows: dict[str, Row]

    @property
    def name(self) -> list[str]:
        """Detector and bits."""
        return [leaf_name(self.leaf)['detector'], bits_of(self.leaf)]


def read_comparison(folder: Path, root: Path) -> list[Comparison]:
    """Read the results in a folder. A missing folder counts as empty.

    Args:
        folder: ``benchmarks/results/NAME`` with one JSON file per run of a config in ``configs/NAME``.
        root: Folder with ``configs/``.

    Returns:
        One entry for each zero-shot leaf config of ``configs/NAME``, ordered by detector and decreasing bits.

    Raises:
        UserError: If there are no leaf configs; if the name of a file does not match its config and seed; if a config
            is not part of :data:`COMPARED`; if the runs of a config differ in more than the seed; or if the runs of a
            detector had different teachers.
    """
    configs = root / 'configs' / folder.name
    leaves = sorted(
        (path.relative_to(root).as_posix() for path in configs.glob('*_w?a?.py') if LEAF.fullmatch(path.stem)),
        key=order,
    )
    if not leaves:
        raise UserError(f'no config to compare in {configs}: the names must be DETECTOR_wBITSaBITS.py')
    kept: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob('*.json')):
        results = read_results(path)
        leaf, seed = repository_path(results['config'], root), seed_of(results)
        if path.stem != f'{Path(leaf).stem}_seed{seed}':
            raise UserError(f'{path} holds {leaf} with seed {seed}: rename it')
        kept.setdefault(leaf, []).append(results)
    rows = {leaf: row_of(leaf, runs, folder) for leaf, runs in kept.items()}
    suffixes = dict.fromkeys(suffix for suffix, _ in COMPARED.values())
    found = []
    for leaf in leaves:
        compared = {suffix: _compared_leaf(leaf, suffix) for suffix in suffixes}
        found.append(Comparison(leaf, {suffix: rows.pop(name, Row(name, '')) for suffix, name in compared.items()}))
    if rows:
        raise UserError(f'{", ".join(rows)} is not part of the comparison: remove its results from {folder}')
    _refuse_other_teachers(found, folder)
    return found


def render_comparison(comparisons: Sequence[Comparison], root: Path) -> str:
    """Render a comparison: accuracies, missing runs, settings of the runs, and a command for each config."""
    ran = [row for entry in comparisons for row in entry.rows.values() if row.runs]
    parts = [
        markdown_table(['detector', 'bits', 'FP', *COMPARED], [_comparison_cells(entry) for entry in comparisons]),
        'Box AP / box AP50 / mask AP in percent; with several seeds, mean ± half the range. Brackets show the '
        'number of seeds. FP covers the teachers of all runs of the row. PTQ is the student after initialization '
        'on the synthetic images, before QAT.',
    ]
    if not ran:
        return '\n' + '\n\n'.join([*parts, 'No run yet: all cells are empty.']) + '\n\n'
    missing = [text for entry in comparisons if (text := _missing_columns(entry))]
    if missing:
        parts.append(f'Not run, therefore empty: {"; ".join(missing)}.')
    parts.append(
        markdown_table(
            ['config', 'images', 'synthesis: side x iterations', 'QAT steps x batch', 'seeds', 'device'],
            [_run_cells(row) for row in ran],
        )
    )
    parts.append(OTHER_SEEDS)
    parts.append('```bash\n' + '\n'.join(command(row, root) for row in ran) + '\n```')
    return '\n' + '\n\n'.join(parts) + '\n\n'


def _compared_leaf(leaf: str, suffix: str) -> str:
    path = Path(leaf)
    return (path.parent / 'comparison' / f'{path.stem}{suffix}.py').as_posix() if suffix else leaf


def _refuse_other_teachers(comparisons: Iterable[Comparison], folder: Path) -> None:
    aps: dict[str, list[float]] = {}
    for entry in comparisons:
        for suffix in entry.rows:
            of_teacher = [values[0] for values in _values(entry, suffix, 'float')]
            aps.setdefault(entry.name[0], []).extend(of_teacher)
    for detector, values in aps.items():
        if values and max(values) - min(values) > SAME_TEACHER:
            raise UserError(
                f'the runs of {detector} in {folder} had different teachers, with box AP from {min(values):.3f} to '
                f'{max(values):.3f}: keep those of one teacher'
            )


def _values(entry: Comparison, suffix: str, metrics: str) -> list[list[float]]:
    """Return the accuracies of the evaluated runs, in the order of :data:`COMPARED_METRICS`."""
    return accuracies(entry.rows[suffix].runs, metrics, COMPARED_METRICS)


def _comparison_cells(entry: Comparison) -> list[str]:
    of_teacher = [values for suffix in entry.rows for values in _values(entry, suffix, 'float')]
    columns = [_values(entry, suffix, metrics) for suffix, metrics in COMPARED.values()]
    counted = [f'{means_with_spread(runs)} ({len(runs)})' if runs else '' for runs in columns]
    return [*entry.name, means_with_spread(of_teacher), *counted]


def _missing_columns(entry: Comparison) -> str:
    missing = [title for title, (suffix, metrics) in COMPARED.items() if not _values(entry, suffix, metrics)]
    columns = 'all' if len(missing) == len(COMPARED) else ', '.join(missing)
    return f'{" ".join(entry.name)}: {columns}' if missing else ''


def _run_cells(row: Row) -> list[str]:
    results = row.runs[0]
    measured = results['calibration_set']['statistics']
    return [
        Path(row.leaf).stem,
        f'{measured["images"]} {"real" if measured.get("real") else "synthetic"}',
        *(synthesis_text(results), training_text(results), row.seeds, row.devices),
    ]
