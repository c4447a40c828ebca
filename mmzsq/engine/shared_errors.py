# SPDX-License-Identifier: Apache-2.0
"""Errors of one process that all processes of a run learn of.

Otherwise the others would wait for it until a timeout, or continue without what it was to make.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size

from mmzsq.errors import UserError

T = TypeVar('T')


@contextmanager
def raise_on_all_ranks(group: Any = None) -> Iterator[None]:
    """Raise an error in all processes if the block raises one in any of them.

    All processes must enter the block. The block must not contain communication between them, which a process that
    fails would leave out.

    Args:
        group: Process group for the exchange; its timeout bounds the time to wait for the slowest process.

    Raises:
        Exception: That of the block in this process.
        UserError: The error of the first process that failed, in those that did not. An error of another type is
            described.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = _gather(None if error is None else _portable(error), group)
    if error is not None:
        raise error
    failed = next((failed for failed in errors if failed is not None), None)
    if failed is not None:
        failed.shown_by_peer = True
        raise failed


def on_main(function: Callable[[], T], group: Any = None) -> T:
    """Call a function in rank 0 and return its result in all processes.

    Args:
        function: Called without arguments; the result must be picklable.
        group: See :func:`raise_on_all_ranks`.

    Raises:
        Exception: That of the function in rank 0.
        UserError: The same or its description, in all other processes.
    """
    result: Any = None
    with raise_on_all_ranks(group):
        if get_rank() == 0:
            result = function()
    return _gather(result, group)[0]


def _portable(error: Exception) -> UserError:
    """Return the error, if it can be sent to other processes, or a description."""
    if isinstance(error, UserError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return UserError(str(error))
        return error
    return UserError(f'process {get_rank()} failed: {type(error).__name__}: {error}')


def _gather(value: Any, group: Any) -> list[Any]:
    """Gather a picklable value of each process, in the order of ranks."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
