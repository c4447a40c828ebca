# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix.

Mistakes that a user can correct raise :class:`UserError`. Its message says what is wrong and what to do. The command
line tools print only this message, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """Error in a config, a file or a call that the user can correct.

    Attributes:
        shown_by_peer: Whether another process of the run raised it, which prints it.
    """

    shown_by_peer = False


class NotEvaluatedError(UserError):
    """Training ended and its results are written, but the evaluation failed. The tools end with exit code 3."""


def check_keys(cfg: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Reject unknown keys.

    Args:
        cfg: Config section to check.
        allowed: Known keys.
        where: Name of the section in the message, for example ``'zsq.quantizer'``.

    Raises:
        UserError: If ``cfg`` has an unknown key. The message names the most similar known key.

    Example:
        >>> check_keys({'w_bit': 4}, ['w_bits', 'a_bits'], 'zsq.quantizer')
        Traceback (most recent call last):
        mmzsq.errors.UserError: unknown key 'w_bit' in zsq.quantizer. Did you mean 'w_bits'? Known keys: a_bits, w_bits.
    """
    allowed = sorted(allowed)
    for key in cfg:
        if key in allowed:
            continue
        nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.4)
        hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
        raise UserError(f'unknown key {key!r} in {where}.{hint} Known keys: {", ".join(allowed)}.')
