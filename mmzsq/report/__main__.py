# SPDX-License-Identifier: Apache-2.0
"""Write the report of a run again, or compare runs: ``python -m mmzsq.report WORK_DIR [WORK_DIR ...]``.

Runs that differ in their seeds only become one row with mean and standard deviation. ``--card`` also writes a model
card for a hub.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmzsq import cli
from mmzsq.report.card import write_card
from mmzsq.report.page import write_report


def main() -> None:
    """Parse the command line and write the files."""
    options = argparse.ArgumentParser(description='Write the report of a run, or one that compares runs.')
    options.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='folder of a run, with results.json')
    options.add_argument(
        '--out', metavar='FILE', help='the page (default: WORK_DIR/report.html, or comparison.html of several runs)'
    )
    options.add_argument('--card', action='store_true', help='also write WORK_DIR/model_card.md of each run')
    args = options.parse_args()
    written = [write_report(args.work_dirs, args.out)]
    if args.card:
        written += [write_card(Path(work_dir)) for work_dir in args.work_dirs]
    for path in written:
        sys.stdout.write(f'{path}\n')


if __name__ == '__main__':
    cli.run(main)
