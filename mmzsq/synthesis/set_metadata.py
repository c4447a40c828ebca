# SPDX-License-Identifier: Apache-2.0
"""Metadata of a calibration set: read from disk and compare.

A set generated with another teacher, seed or setting must be neither reused nor overwritten. An error message lists all
differences.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmzsq.atomic_files import to_json
from mmzsq.errors import UserError

FORMAT = 'mmzsq.calibration_set'
FORMAT_VERSION = 1
"""Incremented when an older reader would misread a set."""

METADATA_KEYS = ('num_images', 'shard_size', 'classes', 'uses_real_labels', 'fingerprint')
"""Keys to compare, both in ``manifest.json`` and in ``settings.json``."""

_ABSENT = object()


class DamagedFileError(UserError):
    """A file of a calibration set is not what was written.

    Args:
        path: The file.
        reason: What is wrong with it.

    Attributes:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f'{path} is damaged ({reason}). Delete it and run the command that generates the calibration set again'
        )


def build_metadata(**values: Any) -> dict[str, Any]:
    """Build the content of ``settings.json``.

    Args:
        **values: A value for each of :data:`METADATA_KEYS`; other keys are dropped.

    Returns:
        Format, format version and values, in JSON types: tuples become lists.
    """
    version = {'format': FORMAT, 'format_version': FORMAT_VERSION}
    return json.loads(to_json({**version, **{key: values[key] for key in METADATA_KEYS}}))


def read_json(path: Path) -> Any:
    """Read a JSON file of a calibration set.

    Raises:
        DamagedFileError: If it cannot be read or is not JSON, for example after disk damage.
    """
    # Reading a named pipe would wait for a writer.
    if not path.is_file():
        raise DamagedFileError(path, 'it is not a regular file')
    try:
        return json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError) as error:
        raise DamagedFileError(path, str(error)) from error


def read_metadata(root: Path) -> dict[str, Any] | None:
    """Read the metadata of the complete or incomplete set in ``root``.

    Returns:
        The metadata, as returned by :func:`build_metadata`; None if there is no set.

    Raises:
        DamagedFileError: If a file is damaged.
        UserError: If a file does not belong to a calibration set, or has another format version.
    """
    for path in metadata_files(root):
        if path.exists():
            return _read_metadata_file(root, path)
    return None


def read_intact_metadata(root: Path) -> dict[str, Any] | None:
    """Read the metadata as :func:`read_metadata` does, but skip damaged files."""
    for path in metadata_files(root):
        with contextlib.suppress(DamagedFileError):
            if path.exists():
                return _read_metadata_file(root, path)
    return None


def metadata_files(root: Path) -> tuple[Path, Path]:
    """Return the files with metadata: that of a complete set, then that of any set."""
    return root / 'manifest.json', root / 'shards' / 'settings.json'


def _read_metadata_file(root: Path, path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise UserError(f'{path} does not belong to a calibration set: choose another directory')
    version = content.get('format_version')
    if version is None:
        raise DamagedFileError(path, "it lacks 'format_version'")
    if version != FORMAT_VERSION:
        raise UserError(
            f'the calibration set in {root} has format version {version}, but this version of mmzsq reads '
            f'{FORMAT_VERSION}: install the version that generated it, or generate a new set in another directory'
        )
    reason = _find_damage(content)
    if reason is not None:
        raise DamagedFileError(path, reason)
    return build_metadata(**content)


def _find_damage(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the values of :data:`METADATA_KEYS`, if anything."""
    kinds = dict(num_images=int, shard_size=int, classes=list, uses_real_labels=bool, fingerprint=dict)
    for key in METADATA_KEYS:
        if type(content.get(key)) is not kinds[key]:
            return f'it lacks {key!r}' if key not in content else f'{key!r} is {content[key]!r}'
    for key in ('num_images', 'shard_size'):
        if content[key] < 1:
            return f'{key!r} is {content[key]}'
    return None


def check_metadata(root: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that the set in ``root`` has the expected metadata.

    Args:
        root: Directory of the set, for the message.
        found: Metadata of the set, from :func:`read_metadata`.
        expected: Metadata of this run, from :func:`build_metadata`.

    Raises:
        UserError: If they differ; the message lists each differing key with both values, and what to do.
    """
    before, now = dict(_flatten(found)), dict(_flatten(expected))
    differences = [
        f'{key.removeprefix("fingerprint.")}: {_show(before, key)} there, {_show(now, key)} now'
        for key in dict.fromkeys([*before, *now])
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
    if differences:
        raise UserError(
            f'{root} holds a calibration set generated with other settings: {join_some(differences)}. '
            'To keep it, set zsq.calibration_set.dir to another directory; to generate it again, delete the directory'
        )


def _flatten(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their paths, such as ``priors[0].weight``."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f'{name}.{key}' if name else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flatten(item, f'{name}[{index}]')
    else:
        yield name, value


def _show(leaves: Mapping[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else 'absent'


def join_some(items: Sequence[str], limit: int = 20) -> str:
    """Join the first ``limit`` items for a message, followed by the number of the others."""
    more = f'; and {len(items) - limit} more' if len(items) > limit else ''
    return '; '.join(items[:limit]) + more
