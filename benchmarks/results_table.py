# SPDX-License-Identifier: Apache-2.0
"""Write the tables of a README from the ``results.json`` of runs, or check that they are up to date.

    python benchmarks/results_table.py configs/zsq/README.md
    python benchmarks/results_table.py configs/zsq/README.md --check

Reported runs are kept as ``benchmarks/results/NAME/CONFIG_PRESET.json``, with several seeds as
``CONFIG_PRESET_seedSEED.json``, or as ``PRESET_BITS_seedSEED.json``, the names that ``yolo.py`` gives. A table is
written between two lines of the Markdown file. The first names a folder, or files by shell patterns without ``.json``:

    <!-- table of benchmarks/results/NAME -->
    <!-- table of benchmarks/results/NAME/default_w?a?_* benchmarks/results/NAME/paper_w?a?_* -->
    <!-- end of table -->

The table that a run prints at its end is written between two lines that name its file:

    <!-- printed by benchmarks/results/NAME/CONFIG_PRESET.json -->
    <!-- end of print -->

The comparison of zero-shot quantization with quantization on real images has a row for every leaf config of
``configs/NAME``. Its runs are kept as ``benchmarks/results/NAME/CONFIG_seedSEED.json``. It is written between

    <!-- comparison of benchmarks/results/NAME -->
    <!-- end of comparison -->

The other tables have a row for every preset and every leaf config of a detector with results. Cells without a run are
empty. The commands below a table repeat the recorded settings of a run with the current config and presets.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison_table import read_comparison, render_comparison
from kept_runs import (
    BOX_METRICS,
    LEAF,
    OTHER_SEEDS,
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
from markdown_pages import ROOT, markdown_table, means_with_spread, read_text, renew

from mmzsq.config.presets import PRESETS
from mmzsq.engine.report import format_table
from mmzsq.errors import UserError

BLOCK = re.compile(r'(<!-- table of (\S+(?: \S+)*) -->\n).*?(<!-- end of table -->)', re.DOTALL)
PRINTED = re.compile(r'(<!-- printed by (\S+) -->\n).*?(<!-- end of print -->)', re.DOTALL)
COMPARISON = re.compile(r'(<!-- comparison of (\S+) -->\n).*?(<!-- end of comparison -->)', re.DOTALL)
EXPECTED_PRESETS = ('default', 'paper')
"""Presets with a row for every leaf config, even without a run."""


def main() -> None:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('markdown', type=Path, help='the file with the tables')
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the file is not up to date')
    parser.add_argument(
        '--root', type=Path, default=ROOT, help='folder with configs/ and benchmarks/results/ (default: of this file)'
    )
    args = parser.parse_args()
    try:
        text = read_text(args.markdown)
        updated = update(text, args.root)
    except UserError as error:
        raise SystemExit(f'error: {error}') from None
    renew(args.markdown, text, updated, args.check, f'{Path(__file__).name} {args.markdown}')


def update(text: str, root: Path) -> str:
    """Replace every table of a Markdown text.

    Args:
        text: With at least one pair of markers.
        root: Folder with ``configs/`` and ``benchmarks/results/``.

    Raises:
        UserError: If there are no markers, or results cannot be read.
    """
    if not any(kind.search(text) for kind in (BLOCK, PRINTED, COMPARISON)):
        raise UserError(
            'no table to write: add the lines <!-- table of benchmarks/results/NAME --> and <!-- end of table -->'
        )
    text = PRINTED.sub(lambda match: f'{match[1]}{render_print(read_results(root / match[2]))}{match[3]}', text)
    text = COMPARISON.sub(
        lambda match: f'{match[1]}{render_comparison(read_comparison(root / match[2], root), root)}{match[3]}', text
    )
    return BLOCK.sub(lambda match: f'{match[1]}{render(read_rows(match[2], root), root)}{match[3]}', text)


def render_print(results: Mapping[str, Any]) -> str:
    """Render the table that a run printed, and its duration."""
    stages = {name: stage['seconds'] for name, stage in results['calibration_set']['stages'].items()}
    seconds = {**stages, **results['seconds']}
    times = ', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())
    return f'\n```text\n{format_table(results).rstrip()}\n```\n\n{results["device"]}: {times}.\n\n'


def read_rows(places: str, root: Path) -> list[Row]:
    """Read results and add leaf configs without a run.

    Args:
        places: Folders relative to ``root`` with one JSON file per run, or patterns of such files without ``.json``,
            separated by spaces.
        root: Folder with ``configs/``.

    Returns:
        One row for each leaf and each preset of :data:`EXPECTED_PRESETS` or of a run of its detector, ordered by
        detector, preset and decreasing bits.

    Raises:
        UserError: If one of the places has no results, if the name of a file does not match its config, preset and
            seed, or if the runs of a leaf differ in more than the seed or share a seed.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted({path for place in places.split() for path in _files(place, root)}):
        results = read_results(path)
        leaf, preset, seed = repository_path(results['config'], root), results['preset'], seed_of(results)
        name = f'{Path(leaf).stem}_{preset}'
        if path.stem not in (name, f'{name}_seed{seed}', f'{preset}_{bits_of(leaf).lower()}_seed{seed}'):
            raise UserError(f'{path} holds {leaf} under the preset {preset} with seed {seed}: rename it')
        runs.setdefault((leaf, preset), []).append(results)
    rows = {(leaf, preset): row_of(leaf, found, places) for (leaf, preset), found in runs.items()}
    leaves = sorted({leaf for ran, _ in runs for leaf in _leaves_of_one_detector(ran, root)}, key=order)
    detectors = dict.fromkeys(order(leaf)[0] for leaf in leaves)
    tried = {(order(leaf)[0], preset) for leaf, preset in runs}
    return [
        rows.get((leaf, preset), Row(leaf, preset))
        for detector in detectors
        for preset in PRESETS
        if preset in EXPECTED_PRESETS or (detector, preset) in tried
        for leaf in leaves
        if order(leaf)[0] == detector
    ]


def _files(place: str, root: Path) -> list[Path]:
    """Return the JSON files of a folder or a pattern."""
    found = list(root.glob(f'{place}/*.json' if (root / place).is_dir() else f'{place}.json'))
    if not found:
        raise UserError(f'no results in {place}: copy the results.json of a run to it as CONFIG_PRESET.json')
    return found


def render(rows: Sequence[Row], root: Path) -> str:
    """Render rows: accuracies, missing runs, settings of the runs, and commands."""
    ran = [row for row in rows if row.runs]
    missing = [row for row in rows if not row.runs]
    parts = [
        markdown_table(
            ['detector', 'preset', 'bits', 'FP', 'PTQ', 'zero-shot QAT', 'model MB, FP', 'model MB, quantized'],
            [_accuracy_cells(row) for row in rows],
        ),
        'AP / AP50 in percent; with several seeds, mean ± half the range. PTQ is the student after initialization on '
        'the synthetic images, before QAT.',
    ]
    if missing:
        parts.append(f'Not run, therefore empty: {_enumerate_missing(missing)}.')
    parts.append(
        markdown_table(
            [
                *('detector', 'preset', 'bits', 'images', 'synthesis: side x iterations', 'ms per image-iteration'),
                *('QAT steps x batch', 'seeds', 'device'),
            ],
            [_run_cells(row) for row in ran],
        )
    )
    if any(len(row.runs) > 1 for row in ran):
        parts.append(OTHER_SEEDS)
    parts.append('```bash\n' + '\n'.join(command(row, root) for row in ran) + '\n```')
    return '\n' + '\n\n'.join(parts) + '\n\n'


def _accuracy_cells(row: Row) -> list[str]:
    name = leaf_name(row.leaf)['detector']
    if not row.runs:
        return [name, row.preset, bits_of(row.leaf), *[''] * 5]
    sizes = row.runs[0]['model_mb']
    texts = [means_with_spread(accuracies(row.runs, kind, BOX_METRICS)) for kind in ('float', 'ptq', 'zero_shot')]
    return [name, row.preset, bits_of(row.leaf), *texts, f'{sizes["float"]:.2f}', f'{sizes["quantized"]:.2f}']


def _run_cells(row: Row) -> list[str]:
    results = row.runs[0]
    stages = results['calibration_set']['stages'].values()
    return [
        *(leaf_name(row.leaf)['detector'], row.preset, bits_of(row.leaf)),
        str(results['calibration_set']['statistics']['images']),
        synthesis_text(results),
        ', '.join(f'{stage["ms_per_image_iteration"]:.3f}' for stage in stages),
        *(training_text(results), row.seeds, row.devices),
    ]


def _enumerate_missing(rows: Iterable[Row]) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((leaf_name(row.leaf)['detector'], row.preset), []).append(bits_of(row.leaf))
    return '; '.join(f'{name}, {preset}: {", ".join(bits)}' for (name, preset), bits in groups.items())


def _leaves_of_one_detector(leaf: str, root: Path) -> list[str]:
    detector = leaf_name(leaf)['detector']
    found = (root / leaf).parent.glob(f'{detector}_w?a?.py')
    return [path.relative_to(root).as_posix() for path in found if LEAF.fullmatch(path.stem)]


if __name__ == '__main__':
    main()
