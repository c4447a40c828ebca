# SPDX-License-Identifier: Apache-2.0
"""What a calibration set was made of: read from the disk, compared, and differences told in full.

A set made by another teacher, another seed or other settings must neither be taken for the wanted
one nor overwritten.
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
"""Raised whenever an older reader would misread a set."""

SETTINGS = ('num_images', 'shard_size', 'classes', 'uses_real_labels', 'fingerprint')
"""Keys of what is compared, in manifest and settings alike."""

_ABSENT = object()


def set_settings(**settings: Any) -> dict[str, Any]:
    """Name the format and version of ``settings`` (:data:`SETTINGS`), in JSON's types.

    Returns:
        What a set's ``settings.json`` holds: as it is read back, so with lists for tuples.
    """
    named = {'format': FORMAT, 'format_version': FORMAT_VERSION}
    return json.loads(to_json({**named, **{key: settings[key] for key in SETTINGS}}))


def read_json(path: Path) -> Any:
    """Read a file of a calibration set.

    Raises:
        UserError: If it is no JSON: a damaged disk.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f'{path} is damaged ({error}). Delete it and run the command that makes the calibration set again'
        ) from error


def read_settings(root: Path) -> dict[str, Any] | None:
    """Read what the set in ``root``, complete or not, is made of.

    Returns:
        As :func:`set_settings`; None if there is no set.

    Raises:
        UserError: If it is of another format version.
    """
    for path in (root / 'manifest.json', root / 'shards' / 'settings.json'):
        if not path.exists():
            continue
        content = read_json(path)
        if not isinstance(content, dict) or content.get('format') != FORMAT:
            raise UserError(f'{path} is not of a calibration set: choose another directory')
        version = content['format_version']
        if version != FORMAT_VERSION:
            raise UserError(
                f'the calibration set in {root} has format version {version}, this version of '
                f'mmzsq reads {FORMAT_VERSION}: install the version that made it, or make the set '
                'anew in another directory'
            )
        return set_settings(**content)
    return None


def refuse_other_settings(root: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare what the set in ``root`` is made of with what is wanted.

    Args:
        root: For the message.
        found: As :func:`read_settings` returns it.
        wanted: As :func:`set_settings` returns it.

    Raises:
        UserError: If they differ; names each differing key, with both values, and what to do.
    """
    before, now = dict(_flatten(found)), dict(_flatten(wanted))
    differences = [
        f'{key.removeprefix("fingerprint.")}: {_show(before, key)} there, {_show(now, key)} now'
        for key in dict.fromkeys([*before, *now])
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
    if differences:
        raise UserError(
            f'{root} holds a calibration set made otherwise: {enumerate_some(differences)}. '
            'To keep it, set zsq.calibration_set.dir to another directory; to make it anew, '
            'delete the directory'
        )


def _flatten(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their paths, as ``priors[0].weight``."""
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


def enumerate_some(items: Sequence[str], limit: int = 20) -> str:
    """Join ``items`` for a message; beyond ``limit`` only their number is told."""
    more = f'; and {len(items) - limit} more' if len(items) > limit else ''
    return '; '.join(items[:limit]) + more
