# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: the README is the first page, and linked files of the repository become part of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'(\]\()(?!https?:|#|mailto:)([^)#\s]+)')


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and every file of the repository that a page links to.

    Args:
        files: The pages of ``docs/``.
        config: MkDocs' configuration.

    Returns:
        The same files and the added ones: pages as ``source/PATH.md``, others as ``source/PATH.txt``.
    """
    files.append(File.generated(config, 'README.md', content=(ROOT / 'README.md').read_text(encoding='utf-8')))
    queue = [(file.src_uri, _home(file.src_uri)) for file in files if file.src_uri.endswith('.md')]
    while queue:
        _, home = queue.pop()
        for _, link in LINK.findall(home.read_text(encoding='utf-8')):
            target = _resolve(home, link)
            uri = _uri(target)
            if target is None or uri is None or files.get_file_from_path(uri) is not None:
                continue
            files.append(_added(config, uri, target))
            if uri.endswith('.md'):
                queue.append((uri, target))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the pages of the site.

    Args:
        markdown: Text of a page.
        page: The page.
        config: MkDocs' configuration.
        files: All files of the site.

    Returns:
        The text. A link to a folder becomes its text alone.
    """
    home = _home(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def point(match: re.Match[str]) -> str:
        uri = _uri(_resolve(home, match[2]))
        return match[1] + (match[2] if uri is None else posixpath.relpath(uri, here or '.'))

    markdown = re.sub(r'\[([^\]]+)\]\(((?!https?:|#|mailto:)[^)#\s]+)\)', lambda m: _without_folder(home, m), markdown)
    return LINK.sub(point, markdown)


def _without_folder(home: Path, match: re.Match[str]) -> str:
    target = _resolve(home, match[2])
    return match[1] if target is not None and target.is_dir() else match[0]


def _home(uri: str) -> Path:
    """Return where a page of the site stands in the repository."""
    if uri == 'README.md':
        return ROOT / uri
    return ROOT / uri.removeprefix('source/') if uri.startswith('source/') else ROOT / 'docs' / uri


def _resolve(home: Path, link: str) -> Path | None:
    target = (home.parent / link).resolve()
    return target if target.exists() and target.is_relative_to(ROOT) else None


def _uri(target: Path | None) -> str | None:
    """Return where a file of the repository stands in the site, None for a folder."""
    if target is None or target.is_dir():
        return None
    path = target.relative_to(ROOT)
    if path.parts[0] == 'docs':
        return posixpath.join(*path.parts[1:])
    if str(path) == 'README.md':
        return 'README.md'
    shown = ('.md', '.jpg', '.png', '.svg', '.ipynb')
    return f'source/{path.as_posix()}' + ('' if path.suffix in shown else '.txt')


def _added(config: Any, uri: str, target: Path) -> File:
    # MkDocs refuses links to README.md and index.md of one folder, so that only text is generated.
    if target.suffix in ('.jpg', '.png', '.svg'):
        return File.generated(config, uri, abs_src_path=str(target))
    return File.generated(config, uri, content=target.read_text(encoding='utf-8'))
