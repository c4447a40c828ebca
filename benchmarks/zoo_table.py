# SPDX-License-Identifier: Apache-2.0
"""Check detectors of MMDetection's model zoo and write the outcome to the table of a page.

    python benchmarks/zoo_table.py docs/zoo.md
    python benchmarks/zoo_table.py docs/zoo.md --families DETR DINO
    python benchmarks/zoo_table.py docs/zoo.md --gpu

``tests/zoo`` defines the checks and the detectors. Rows of other detectors are kept. The outcome on a GPU comes from
``benchmarks/results/zoo_gpu.jsonl``, which ``ZOO_RESULTS=... pytest tests/zoo -m cuda`` writes. With ``--gpu``, only
that column is replaced. The table is written between two lines of the Markdown file:

    <!-- table of the zoo -->
    <!-- end of table -->
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmzsq import cli
from mmzsq.errors import UserError

ZOO = Path(__file__).resolve().parents[1] / 'tests/zoo'
BLOCK = re.compile(r'(<!-- table of the zoo -->\n)(.*?)(<!-- end of table -->)', re.DOTALL)
GPU_RESULTS = Path(__file__).resolve().parent / 'results/zoo_gpu.jsonl'
HEADER = (
    *('detector', 'config', 'CPU fp32', 'GPU bf16', 'quantized layers', 'float layers, reason', 'notes'),
    's, CPU',
)
GPU_COLUMN = HEADER.index('GPU bf16')
SHOWN_LAYERS = 2


def parse_rows(page: str) -> dict[str, str]:
    """Return the rows of a page's table by the detector in the first column.

    Raises:
        UserError: If the page has no markers.
    """
    found = BLOCK.search(page)
    if found is None:
        raise UserError('the page has no line <!-- table of the zoo --> with <!-- end of table --> below it')
    rows = [line for line in found[2].splitlines() if line.startswith('|')][2:]
    return {row.split('|')[1].strip(): row for row in rows}


def with_rows(page: str, rows: Iterable[str]) -> str:
    """Return the page with these rows in its table."""
    lines = ['| ' + ' | '.join(HEADER) + ' |', '| ' + ' | '.join('---' for _ in HEADER) + ' |', *rows]
    return BLOCK.sub(lambda found: found[1] + '\n'.join(lines) + '\n' + found[3], page)


def gpu_results(lines: Iterable[str]) -> dict[str, str]:
    """Return the outcome on a GPU by detector; of several results of one detector, the last one counts.

    Args:
        lines: Lines of JSON that ``tests/zoo/test_zoo.py`` writes.
    """
    outcomes = {}
    for result in map(json.loads, lines):
        outcome = 'yes' if result['failed'] is None else f'no: {result["failed"]}: {result["reason"]}'
        if result['fp32_reason']:
            outcome += f', with its loss in fp32: {result["fp32_reason"]}'
        outcomes[result['name']] = outcome.replace('|', r'\|')
    return outcomes


def with_gpu_result(line: str, outcome: str) -> str:
    """Return a line of the table with another outcome on a GPU."""
    cells = re.split(r'(?<!\\)\|', line)
    cells[GPU_COLUMN + 1] = f' {outcome} '
    return '|'.join(cells)


def row(family: Any, result: Any, gpu: str = '') -> str:
    """Format one line of the table.

    Args:
        family: A ``Family`` of ``tests/zoo/families.py``.
        result: Returned by ``check`` of ``tests/zoo/harness.py`` for the CPU.
        gpu: Outcome on a GPU.
    """
    works = 'yes' if result.works else f'no: {result.failed}: {result.reason}'
    to_know = [family.needs] if family.needs else []
    if result.silent:
        to_know.append(f'not trained, since their inputs are all zero: {_names(result.silent)}')
    cells = (
        *(family.name, f'`{family.config}`', works, gpu, str(result.quantized), floats(result.floats)),
        *('; '.join(to_know), f'{result.seconds:.0f}'),
    )
    return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


def floats(reasons: Mapping[str, str]) -> str:
    """Format the layers that stayed float, grouped by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return '; '.join(f'{_names(of_reason)} ({reason})' for reason, of_reason in names.items())


def _names(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN_LAYERS} more' if len(names) > SHOWN_LAYERS else ''
    return ', '.join(f'`{name}`' for name in names[:SHOWN_LAYERS]) + more


def main() -> None:
    """Parse the command line, check, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('page', type=Path, help='Markdown file with the table')
    parser.add_argument('--families', nargs='+', metavar='NAME', help='detectors to check (default: all)')
    parser.add_argument('--gpu', action='store_true', help='check nothing; replace the column of the GPU')
    args = parser.parse_args()
    sys.path.insert(0, str(ZOO))
    from families import FAMILIES
    from harness import check, zoo_config

    known = [family.name for family in FAMILIES]
    unknown = [name for name in args.families or () if name not in known]
    if unknown:
        raise UserError(f'the zoo has no {", ".join(unknown)}; it has {", ".join(known)}')
    gpu = gpu_results(GPU_RESULTS.read_text().splitlines()) if GPU_RESULTS.is_file() else {}
    if args.gpu:
        page = args.page.read_text()
        lines = [with_gpu_result(line, gpu.get(name, '')) for name, line in parse_rows(page).items()]
        args.page.write_text(with_rows(page, lines))
        return
    logging.disable(logging.INFO)
    for family in FAMILIES:
        if args.families is None or family.name in args.families:
            with tempfile.TemporaryDirectory() as folder:
                result = check(zoo_config(family.config, family.size, family.shrink, family.changes), folder)
            # Written row by row, since a run of all detectors takes many minutes.
            page = args.page.read_text()
            rows = {**parse_rows(page), family.name: row(family, result, gpu.get(family.name, ''))}
            args.page.write_text(with_rows(page, [rows[name] for name in known if name in rows]))
            sys.stderr.write(f'{family.name}: {"works" if result.works else result.failed}, {result.seconds:.0f} s\n')


if __name__ == '__main__':
    cli.run(main)
