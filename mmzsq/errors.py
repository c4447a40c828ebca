# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on.

Whatever a user can get wrong raises :class:`UserError` with one message that says what is wrong and what to do. The
command line tools print that message alone, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A mistake in a config, a file or a call that the user can correct."""


def check_keys(cfg: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Refuse keys that nothing reads.

    Args:
        cfg: The section to check.
        allowed: The keys that are known.
        where: Name of the section in the message, for example ``'zsq.quantizer'``.

    Raises:
        UserError: If ``cfg`` has an unknown key; the message names the nearest known one.
    """
    allowed = sorted(allowed)
    for key in cfg:
        if key in allowed:
            continue
        nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.4)
        hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
        raise UserError(f'unknown key {key!r} in {where}.{hint} Known keys: {", ".join(allowed)}.')
