# SPDX-License-Identifier: Apache-2.0
"""Metadata of a calibration set: read from disk and compare.

A set generated with another teacher, seed or setting must be neither reused nor overwritten. An error message lists all
differences.
"""

from __future__ import annotations

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
        UserError: If it is not JSON, for example after disk damage.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f'{path} is damaged ({error}). Delete it and run the command that generates the calibration set again'
        ) from error


def read_metadata(root: Path) -> dict[str, Any] | None:
    """Read the metadata of the complete or incomplete set in ``root``.

    Returns:
        The metadata, as returned by :func:`build_metadata`; None if there is no set.

    Raises:
        UserError: If a file is damaged, does not belong to a calibration set, or has another format version.
    """
    for path in (root / 'manifest.json', root / 'shards' / 'settings.json'):
        if not path.exists():
            continue
        content = read_json(path)
        if not isinstance(content, dict) or content.get('format') != FORMAT:
            raise UserError(f'{path} does not belong to a calibration set: choose another directory')
        version = content['format_version']
        if version != FORMAT_VERSION:
            raise UserError(
                f'the calibration set in {root} has format version {version}, but this version of mmzsq reads '
                f'{FORMAT_VERSION}: install the version that generated it, or generate a new set in another directory'
            )
        return build_metadata(**content)
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
