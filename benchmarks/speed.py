# SPDX-License-Identifier: Apache-2.0
"""Measure all that docs/performance.md reports of one GPU, the most important first, within a budget of time.

    python benchmarks/speed.py --out benchmarks/results/benchmarks --budget 500
    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md

Each case of ``speed_cases.py`` is written as soon as it is measured, beside what earlier runs left. A case for which
the time left does not suffice is skipped, and the tool says so. One process measures all, so that PyTorch starts once;
after a failure, which may leave a GPU unusable to a process, another takes over.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from speed_cases import CASES, Case

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'benchmarks'


class CaseError(Exception):
    """A case that was not measured, and why."""


class Worker:
    """A process that measures one case after the other; started when it is first asked, and again after a failure.

    Args:
        device: Where it measures; None: on a GPU if there is one.
        tools: Folder of ``benchmark.py``.
    """

    def __init__(self, device: str | None, tools: Path = TOOLS) -> None:
        self.device = device
        self.tools = tools
        self._process: Any = None
        self._connection: Any = None

    def measure(self, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
        """Measure one case.

        Args:
            arguments: Command line of ``benchmark.py``, less ``--out``.
            seconds: After which it is given up.

        Raises:
            CaseError: If it fails or takes longer.
        """
        if self._process is None:
            self._start()
        self._connection.send([*arguments, *(['--device', self.device] if self.device else [])])
        failure = f'not finished after {seconds:.0f} s'
        try:
            if self._connection.poll(seconds):
                result, failure = self._connection.recv()
                if failure is None:
                    return result
        except EOFError:
            failure = 'its process died'
        self.stop()
        raise CaseError(failure)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        # A GPU cannot be used in a forked process.
        context = multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.tools), daemon=True)
        self._process.start()
        theirs.close()


def serve(connection: Connection, tools: Path) -> None:
    """Measure what arrives with the benchmark in ``tools``, and send back a result or why there is none."""
    sys.path[:0] = [str(tools), str(ROOT)]
    # Cases name their configs from here.
    os.chdir(ROOT)
    import benchmark

    while True:
        arguments = connection.recv()
        try:
            connection.send((benchmark.measure(benchmark.parse([*arguments, '--out', 'unused.json'])), None))
        except Exception as error:
            # Whatever it is, it costs this case alone.
            connection.send((None, f'{type(error).__name__}: {error}'))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    names = [case.name for case in CASES]
    parser.add_argument('--out', type=Path, required=True, help='folder for one JSON file a case')
    parser.add_argument('--budget', type=float, default=500, help='seconds for all (default: 500)')
    parser.add_argument('--cases', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--device', help='(default: a GPU if there is one)')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    missed = run([case for case in CASES if case.name in args.cases], args.out, args.budget, Worker(args.device))
    if missed:
        sys.exit(f'error: {len(missed)} of {len(args.cases)} cases were not measured: {", ".join(missed)}')


def run(cases: Sequence[Case], out: Path, budget: float, worker: Worker) -> list[str]:
    """Measure cases in their order and write each result.

    Args:
        cases: The most important first.
        out: Folder for one JSON file a case.
        budget: Seconds for all.
        worker: Measures them.

    Returns:
        Names of the cases that failed or were skipped.
    """
    start = time.monotonic()
    missed = []
    for case in cases:
        left = budget - (time.monotonic() - start)
        if left < case.seconds:
            _tell(start, f'{case.name}: skipped, since it takes {case.seconds} s and {max(left, 0):.0f} s are left')
            missed.append(case.name)
            continue
        begun = time.monotonic()
        try:
            result = worker.measure(case.arguments(), left)
        except CaseError as error:
            _tell(start, f'{case.name}: {error}')
            missed.append(case.name)
            continue
        path = out / f'{case.name}.json'
        path.write_text(json.dumps(dict(case=case.name, **result), indent=2) + '\n', encoding='utf-8')
        goals = ', '.join(f'{goal.key} {goal.measured(result)} (goal {goal.limit})' for goal in case.goals)
        _tell(start, f'{case.name}: {time.monotonic() - begun:.0f} s{": " if goals else ""}{goals}')
    worker.stop()
    return missed


def _tell(start: float, text: str) -> None:
    sys.stdout.write(f'[{time.monotonic() - start:5.0f} s] {text}\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
