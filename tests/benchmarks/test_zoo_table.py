# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/zoo_table.py: one row per detector; other rows are kept."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, Family
from harness import CONFIGS, Result

from mmzsq.errors import UserError

PAGE = 'Text.\n\n<!-- table of the zoo -->\n{}<!-- end of table -->\n\nMore.\n'


@pytest.fixture
def tool(repo: Path) -> dict[str, Any]:
    return runpy.run_path(str(repo / 'benchmarks/zoo_table.py'))


def test_a_row_shows_outcome_and_float_layers(tool: dict[str, Any]) -> None:
    works = Result(quantized=7, seconds=2.4, floats={'a.x': 'Conv1d: why', 'a.y': 'Conv1d: why', 'b': 'Own: so'})
    works.silent = ['first', 'second', 'third']
    assert tool['row'](Family('A', 'a/a.py', needs='a package'), works) == (
        '| A | `a/a.py` | yes |  | 7 | `a.x`, `a.y` (Conv1d: why); `b` (Own: so) | '
        'a package; not trained, since their inputs are all zero: `first`, `second` and 1 more | 2 |'
    )
    fails = Result(failed='relabel', reason='KeyError: a|b', seconds=0.6)
    row = tool['row'](Family('B', 'b.py'), fails, 'yes')
    assert row == r'| B | `b.py` | no: relabel: KeyError: a\|b | yes | 0 |  |  | 1 |'


def test_results_of_a_gpu_replace_their_column_only(tool: dict[str, Any]) -> None:
    line = dict(name='B', size=64, failed='train', reason='KeyError: a|b', fp32_reason=None, seconds=1.0)
    repaired = dict(line, failed=None, reason='', fp32_reason='the loss is nan')
    found = tool['gpu_results']([json.dumps(line), json.dumps(dict(line, name='C')), json.dumps(repaired)])
    assert found == {
        'B': 'yes, with its loss in fp32: the loss is nan',
        'C': r'no: train: KeyError: a\|b',
    }
    row = tool['row'](Family('B', 'b.py'), Result(failed='relabel', reason='KeyError: a|b', seconds=0.6), 'old')
    assert tool['with_gpu_result'](row, found['C']) == row.replace('old', found['C'])


def test_rows_round_trip_through_the_page(tool: dict[str, Any]) -> None:
    rows = {'A': '| A | one |', 'B, two-stage': '| B, two-stage | two |'}
    page = tool['with_rows'](PAGE.format('old\n'), rows.values())
    assert page.startswith('Text.\n\n<!-- table of the zoo -->\n| detector |')
    assert page.endswith('<!-- end of table -->\n\nMore.\n')
    assert tool['parse_rows'](page) == rows
    assert 'old' not in page
    with pytest.raises(UserError, match='no line <!-- table of the zoo -->'):
        tool['parse_rows']('Text.\n')


def test_the_page_has_a_row_for_every_detector_and_no_other(tool: dict[str, Any], repo: Path) -> None:
    rows = tool['parse_rows']((repo / 'docs/zoo.md').read_text())
    assert list(rows) == [family.name for family in FAMILIES]
    for family in FAMILIES:
        assert f'`{family.config}`' in rows[family.name]
        assert (CONFIGS / family.config).is_file()
