# SPDX-License-Identifier: Apache-2.0
"""What the console of a run shows: MMEngine's dumps go to the log file alone."""

from __future__ import annotations

import logging
from pathlib import Path

DUMPS = (
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order',
    'Distributed training is not used, all SyncBatchNorm',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)
"""Starts of MMEngine's messages about the environment, the whole config, the order of hooks and its own code."""


class _WithoutDumps(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return not str(record.msg).startswith(DUMPS)


def shorten_console(logger: logging.Logger) -> Path | None:
    """Keep MMEngine's dumps from the console. Log files still get them.

    Args:
        logger: The logger of a run.

    Returns:
        The log file; None if there is none.
    """
    path = None
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            path = Path(handler.baseFilename)
        elif not any(isinstance(known, _WithoutDumps) for known in handler.filters):
            handler.addFilter(_WithoutDumps())
    return path
