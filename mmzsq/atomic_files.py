# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whatever happens while they are written.

A file is written beside its place, forced to the disk, and renamed into place, which file systems
do in one step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
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
    """Write a file so that ``path`` holds its old content or all of the new, whatever happens.

    Args:
        path: The file, in a directory that exists.
        content: All of it.

    Raises:
        UserError: If the disk is full or the place not writable; what ``path`` held is kept.
    """
    # A name of its own, lest two runs that share the directory by mistake write into one file.
    unfinished = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
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


def to_json(content: Any, indent: int | None = None) -> bytes:
    """Encode JSON with a newline at its end; ``indent`` is that of :func:`json.dumps`."""
    return json.dumps(content, indent=indent).encode() + b'\n'


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
        name, _unique, _suffix = path.name[1:].rsplit('.', 2)
        if name in names:
            path.unlink(missing_ok=True)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of ``content``, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _sync_directory(path: Path) -> None:
    """Force renames in a directory to the disk; only POSIX can and must."""
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; their servers order renames.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
