# SPDX-License-Identifier: Apache-2.0
"""Run the tests of ``tests/reliability`` and print how wrong inputs and interrupted runs end.

    python benchmarks/reliability.py [--ci] [--junit FILE]

Inputs end in one of these ways: ``clear``, one message that names key or file and the remedy, with exit code 2;
``traceback``; ``accepted`` wrongly; ``lost``, a file was changed or written; ``unclear``, another message or exit code.
Runs that were killed and continued are ``bit-equal`` with an undisturbed run, have ``other bits``, or are ``lost``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from defusedxml import ElementTree

TESTS = Path(__file__).resolve().parents[1] / 'tests' / 'reliability'

INPUTS = ('clear', 'traceback', 'accepted', 'unclear', 'lost')
RUNS = ('bit-equal', 'other bits', 'lost')

BEFORE: dict[str, dict[str, int]] = {
    'wrong inputs': dict(clear=139, traceback=57, accepted=12, unclear=5, lost=0),
    'killed runs': {'bit-equal': 17, 'other bits': 12, 'lost': 5},
}
"""Trials by hand at revision e3cf8ac: 237 inputs, 24 of which were rightly accepted. Of the runs, 16 were killed in
synthesis, 13 in training, and 5 while they saved a checkpoint."""


def main() -> None:
    """Parse the command line, run the tests, and print a table. The exit code is that of pytest."""
    options = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    options.add_argument('--ci', action='store_true', help='only the tests that CI runs')
    options.add_argument('--junit', type=Path, metavar='FILE', help='summarize this report of an earlier run instead')
    args = options.parse_args()
    if args.junit is not None:
        sys.stdout.write(table(summarize(args.junit)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, 'report.xml')
        marks = [] if args.ci else ['-m', '']
        command = [sys.executable, '-m', 'pytest', '-q', str(TESTS), *marks, '-o', 'junit_family=xunit1']
        code = subprocess.run([*command, f'--junitxml={report}'], check=False).returncode
        if report.exists():
            sys.stdout.write(table(summarize(report)))
    sys.exit(code)


def summarize(report: Path) -> dict[str, Counter[str]]:
    """Count the verdicts in a report.

    Args:
        report: File that ``pytest --junitxml`` wrote.

    Returns:
        Number of each verdict, of ``'wrong inputs'`` and of ``'killed runs'``.
    """
    found: dict[str, Counter[str]] = {'wrong inputs': Counter(), 'killed runs': Counter()}
    for case in ElementTree.parse(report).iter('testcase'):
        properties = _properties(case)
        if 'verdict' in properties:
            found['wrong inputs'][properties['verdict']] += 1
        for verdict in RUNS:
            found['killed runs'][verdict] += int(properties.get(verdict, 0))
    return found


def table(after: Mapping[str, Mapping[str, int]]) -> str:
    """Format the verdicts as a Markdown table, below those of the trials by hand."""
    columns = list(dict.fromkeys([*INPUTS, *RUNS]))
    lines = [
        f'| | tried | {" | ".join(columns)} |',
        f'|---|{"---|" * (len(columns) + 1)}',
    ]
    for kind, known in (('wrong inputs', INPUTS), ('killed runs', RUNS)):
        for when, counts in (('before', BEFORE[kind]), ('now', after[kind])):
            cells = [str(counts.get(column, 0)) if column in known else '' for column in columns]
            lines.append(f'| {kind}, {when} | {sum(counts.values())} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def _properties(case: Element) -> dict[str, str]:
    return {item.get('name', ''): item.get('value', '') for item in case.iter('property')}


if __name__ == '__main__':
    main()
