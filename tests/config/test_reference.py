# SPDX-License-Identifier: Apache-2.0
"""The generated reference page of all keys."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmzsq.config import reference
from mmzsq.config.sections import TrainConfig


def test_the_page_in_docs_is_up_to_date(repo: Path) -> None:
    assert (repo / 'docs/configuration.md').read_text(encoding='utf-8') == reference.render()


def test_every_key_has_a_row_with_range_default_and_meaning() -> None:
    page = reference.render()
    assert '| `final_lr_ratio` | a number from 0 to 1 | `0.0` | `0.01` | Learning rate at the end' in page
    assert '### mmzsq.TotalVariationPrior' in page
    table = page.split('## `zsq.train`\n')[1].split('\n## ')[0]
    rows = [line for line in table.splitlines() if line.startswith('| `')]
    assert len(rows) == len(TrainConfig.model_fields)
    assert all(len(row.rstrip(' |').rsplit('| ', 1)[1]) > 10 for row in rows)


def test_check_names_a_page_that_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / 'page.md'
    monkeypatch.setattr(sys, 'argv', ['reference', str(page)])
    reference.main()
    monkeypatch.setattr(sys, 'argv', ['reference', str(page), '--check'])
    reference.main()
    page.write_text(page.read_text().replace('max_epochs', 'epochs'))
    with pytest.raises(SystemExit, match='out of date'):
        reference.main()
