# SPDX-License-Identifier: Apache-2.0
"""Links of the Markdown pages and code names in docs/design.md refer to something that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPO.glob('*.md'), *REPO.glob('docs/*.md'), *REPO.glob('configs/**/README.md')])


def definitions(path: Path) -> set[str]:
    """Names of the functions and classes of a file; methods as ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f'{node.name}.{item.name}' for item in node.body if isinstance(item, ast.FunctionDef))
    return names


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r'\]\((?!https?:)([^)#\s]+)', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_functions_named_in_the_walks_exist() -> None:
    text = (REPO / 'docs/design.md').read_text().split('## Five walks through the code')[1].split('## Contract')[0]
    named = re.findall(r'`([\w/]+\.py): ([\w.]+)`', text)
    modules = {str(path.relative_to(REPO / 'mmzsq')): definitions(path) for path in (REPO / 'mmzsq').rglob('*.py')}
    assert len(named) > 40
    unknown = [
        f'{path}: {name}'
        for path, name in named
        if not any(name in names for module, names in modules.items() if f'/{module}'.endswith(f'/{path}'))
    ]
    assert unknown == []
