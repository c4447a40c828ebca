# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and pages that are written or checked."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmzsq.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def renew(page: Path, current: str, updated: str, check: bool, command: str) -> None:
    """Write a page if it has changed, or only check it.

    Args:
        page: The file; its folder is created.
        current: Current content.
        updated: New content.
        check: Whether to write nothing and exit with 1 if the two differ.
        command: Command that updates the page, for the message.
    """
    if updated == current:
        return
    if check:
        sys.stderr.write(f'{page} is not up to date: run {command}\n')
        sys.exit(1)
    page.parent.mkdir(exist_ok=True)
    page.write_text(updated, encoding='utf-8')


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table, with ``|`` in cells escaped."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)


def means_with_spread(runs: Sequence[Sequence[float]]) -> str:
    """Format accuracies in percent; for several runs, mean ± half the range of each."""
    texts = []
    for values in zip(*runs, strict=True):
        spread = f' ± {50 * (max(values) - min(values)):.1f}' if len(values) > 1 else ''
        texts.append(f'{100 * statistics.mean(values):.1f}{spread}')
    return ' / '.join(texts)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error
