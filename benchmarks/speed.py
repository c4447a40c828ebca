# SPDX-License-Identifier: Apache-2.0
"""Measure the cases of docs/performance.md on one GPU, the most important first, within a time budget.

    python benchmarks/speed.py --out benchmarks/results/benchmarks --budget 500
    python benchmarks/performance_page.py benchmarks/results/benchmarks/*.json docs/performance.md

The result of each case of ``speed_cases.py`` is written as soon as it is measured. Results of earlier runs stay. Cases
that do not fit into the remaining time are skipped with a message. One process measures all cases, so that PyTorch
starts once. After a failure, which may leave the GPU unusable to its process, a new process takes over.
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
    """A case could not be measured; the message is the reason."""


class Worker:
    """A process that measures cases one by one. It starts with the first case, and again after a failure.

    Args:
        device: Device to measure on; None uses a GPU if there is one.
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
            arguments: Command line of ``benchmark.py``, without ``--out``.
            seconds: Time limit.

        Raises:
            CaseError: If the case fails or exceeds the limit.
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
        """Stop the process, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        # CUDA cannot be used in a forked process.
        context = multiprocessing.get_context('spawn')
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.tools), daemon=True)
        self._process.start()
        theirs.close()


def serve(connection: Connection, tools: Path) -> None:
    """Measure the cases that arrive and send back pairs (result, error), one of which is None."""
    sys.path[:0] = [str(tools), str(ROOT)]
    # Config paths of cases are relative to the root.
    os.chdir(ROOT)
    import benchmark

    while True:
        arguments = connection.recv()
        try:
            connection.send((benchmark.measure(benchmark.parse([*arguments, '--out', 'unused.json'])), None))
        except Exception as error:
            # Any failure affects this case only.
            connection.send((None, f'{type(error).__name__}: {error}'))


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    names = [case.name for case in CASES]
    parser.add_argument('--out', type=Path, required=True, help='folder for one JSON file per case')
    parser.add_argument('--budget', type=float, default=500, help='seconds for all cases (default: 500)')
    parser.add_argument('--cases', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--device', help='(default: a GPU if there is one)')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    missed = run([case for case in CASES if case.name in args.cases], args.out, args.budget, Worker(args.device))
    if missed:
        sys.exit(f'error: {len(missed)} of {len(args.cases)} cases were not measured: {", ".join(missed)}')


def run(cases: Sequence[Case], out: Path, budget: float, worker: Worker) -> list[str]:
    """Measure cases in order and write each result.

    Args:
        cases: The most important first.
        out: Folder for one JSON file per case.
        budget: Seconds for all cases.
        worker: Process that measures.

    Returns:
        Names of the cases that failed or were skipped.
    """
    start = time.monotonic()
    missed = []
    for case in cases:
        left = budget - (time.monotonic() - start)
        if left < case.seconds:
            _tell(start, f'{case.name}: skipped, needs {case.seconds} s and {max(left, 0):.0f} s are left')
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
