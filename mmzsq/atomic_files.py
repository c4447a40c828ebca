# SPDX-License-Identifier: Apache-2.0
"""Atomic writing and deletion of files.

A file is written under a temporary name in the same directory, synced to disk, and renamed, which is atomic.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmzsq.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an :class:`OSError` inside the block to an error that a user can act on.

    Args:
        path: The path to name in the message.

    Raises:
        UserError: If the block raises :class:`OSError`: full disk, exceeded quota, missing permission.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write {path}: {error.strerror or error}. Files written before are kept: '
            f'{remedy(error)}, and run the same command again to continue'
        ) from error


def remedy(error: OSError) -> str:
    """Return what a user can do about a file that cannot be written, as the end of a sentence."""
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return 'rename the file or folder that is in its place, or choose another folder'
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 'grant write access or choose another folder'
    if error.errno == errno.ENOENT:
        return 'check that the path exists'
    return 'free disk space or grant write access'


def make_directory(path: Path) -> None:
    """Create a directory and its parents, if missing.

    Raises:
        UserError: If the disk is full or not writable.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: at any time, ``path`` has either its old or its new content.

    Args:
        path: The file, in an existing directory.
        content: The whole content.

    Raises:
        UserError: If the disk is full or not writable; ``path`` then keeps its old content.
    """
    # A unique name, in case two runs share the directory by mistake.
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
    """Encode ``content`` as JSON with a final newline; ``indent`` is passed to :func:`json.dumps`."""
    return json.dumps(content, indent=indent).encode() + b'\n'


def delete(path: Path) -> None:
    """Delete a file, if it exists, and sync its directory.

    Raises:
        UserError: If the directory is not writable.
    """
    with disk_errors(path):
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)


def delete_unfinished(directory: Path, names: set[str]) -> None:
    """Delete temporary files that killed processes left in ``directory``.

    Args:
        directory: The directory.
        names: Names of the files that were being written.
    """
    for path in directory.glob('.*.tmp'):
        name, *unique = path.name[1:].rsplit('.', 2)
        # Names without the unique part are not ours.
        if len(unique) == 2 and name in names:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def lock_file(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock inside the block, also against processes on other machines that share the directory.

    The operating system releases the lock when its process ends in any way. Without a lock where the system or the file
    system has none.

    Args:
        path: The file to lock, created if missing, in an existing directory.
        on_wait: Called once if another process holds the lock, before waiting for it.

    Raises:
        UserError: If the file cannot be created.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
        yield
    finally:
        os.close(descriptor)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of ``content`` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _sync_directory(path: Path) -> None:
    """Sync renames in a directory to disk, which is possible and necessary only on POSIX."""
    if os.name != 'posix':
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; their servers keep the order of renames.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
