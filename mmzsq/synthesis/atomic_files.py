# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whatever happens while they are written.

A file is written beside its place, forced to the disk, and renamed into place, which file systems
do in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmzsq.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system on ``path`` into one that a user can act on.

    Raises:
        UserError: If the body raises :class:`OSError`: full disk, exceeded quota, missing
            permission.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write {path}: {error.strerror or error}. All that was written before is kept: '
            'free space or grant write access there, and run the same command again to go on'
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents; it may exist.

    Raises:
        UserError: If the disk is full or the place not writable.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that ``path`` holds the old content or all of the new, even after a power cut.

    Args:
        path: The file, in a directory that exists.
        content: All of it.

    Raises:
        UserError: If the disk is full or the place not writable; what ``path`` held is kept.
    """
    # The process in the name keeps two runs by mistake in one place from writing one file together.
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    with disk_errors(path):
        try:
            with open(unfinished, 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def write_json_atomically(path: Path, content: Any) -> None:
    """Write JSON as :func:`write_atomically` does."""
    write_atomically(path, json.dumps(content, indent=1).encode() + b'\n')


def delete(path: Path) -> None:
    """Delete a file for good; it may be missing.

    Raises:
        UserError: If the place is not writable.
    """
    with disk_errors(path):
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)


def delete_unfinished(directory: Path, names: set[str]) -> None:
    """Delete what killed processes left of the files ``names`` in ``directory``."""
    for path in directory.glob('.*.tmp'):
        name, _process, _suffix = path.name[1:].rsplit('.', 2)
        if name in names:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync_directory(path: Path) -> None:
    """Force renames in a directory to the disk; only POSIX can and must."""
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
