# SPDX-License-Identifier: Apache-2.0
"""What the console of a run shows: the progress of long steps, and no dumps.

MMEngine's dumps, its line for every few iterations, and the table of layers go to the log file alone. A terminal shows
a bar for each long step. A pipe or a file gets plain lines instead, about ten for each step.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mmengine.dist import get_rank
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

Item = TypeVar('Item')
DUMPS = (
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order',
    'Distributed training is not used, all SyncBatchNorm',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    # The progress of training and evaluation has the same numbers.
    'Epoch(train)',
    'Epoch(val)',
    'Iter(train)',
    'Iter(val)',
    'Exp name: ',
    # One line for each epoch. The console names the folder of the checkpoints.
    'Saving checkpoint at ',
    # The table of classes, which the report has.
    '\n+--',
)
"""Starts of MMEngine's messages about the environment, the whole config, the order of hooks, its own code, the
iterations of training and evaluation, checkpoints, and classes."""

FILE_ONLY = {'mmzsq_file_only': True}
"""Value of ``extra`` of a message that only the log file gets: ``logger.info(text, extra=FILE_ONLY)``."""

LINE_SECONDS = 15.0
"""Least time between two lines of a step, in seconds."""

LINE_SHARE = 0.1
"""Share of a step between two of its lines."""

MAX_LINE_SECONDS = 600.0
"""Longest time without a line, in seconds, however long a step takes. Some services end a job that is silent."""

QUICK_SECONDS = 1.0
"""Time of a step that needs no line on the console, in seconds."""

TEXT_SECONDS = 0.5
"""Least time between two readings of the losses for a bar, in seconds. Each one waits for a GPU."""

ROUNDING = 1e-9
"""Share of the work that may be missing at the end, since amounts are added up."""


class _WithoutDumps(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        return not (hasattr(record, 'mmzsq_file_only') or str(record.msg).startswith(DUMPS))


def shorten_console(logger: logging.Logger) -> Path | None:
    """Keep MMEngine's dumps, and messages with :data:`FILE_ONLY`, from the console. Log files still get them.

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


class ConsoleProgress:
    """Progress of one long step: a bar on a terminal, log lines elsewhere. Only rank 0 shows it.

    Args:
        logger: Receives the lines. On a terminal, only its log file gets them.
        title: Name of the step.
        total: Amount of work.
        unit: Name of what the rate counts, in the plural.
        units: Number of these in ``total``. By default ``total``.
        start: Work that was done before, by a run that this one resumes.
        console: Where the bar is drawn. By default the standard output.

    Example:
        >>> with ConsoleProgress(logging.getLogger('example'), 'evaluation', 2, 'images') as progress:
        ...     for image in progress.each(['a.png', 'b.png']):
        ...         pass
    """

    def __init__(
        self,
        logger: logging.Logger,
        title: str,
        total: float,
        unit: str,
        units: float | None = None,
        start: float = 0.0,
        console: Console | None = None,
    ) -> None:
        self.logger = logger
        self.title = title
        self.total = total
        self.unit = unit
        self.units = total if units is None else units
        self.done = self.start = start
        # The stream is named, so that a block without prints still shows the bar.
        self.console = Console(file=sys.stdout) if console is None else console
        self._is_shown = get_rank() == 0
        self._is_finished = False
        self._bar: Progress | None = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> ConsoleProgress:
        self._began = self._logged = self._read = time.perf_counter()
        self._logged_work = self.start
        if self._is_shown and self.console.is_terminal:
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        self._bar.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn(f'[bold]{self.title}'),
            BarColumn(),
            TextColumn('{task.percentage:>3.0f}% {task.description}'),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task('', total=self.total)
        self._bar.update(self._task, completed=self.start)
        streams = (sys.stdout, sys.stderr)
        self._bar.start()
        # Lines of the log appear above the bar: handlers write to the streams that rich has put in place.
        for handler in self.logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Return items, and count each as done when the next one is taken.

        Args:
            items: As many as the step has work.
        """
        for item in items:
            yield item
            self.advance(1)

    def advance(self, work: float, text: Callable[[], str] = str) -> None:
        """Show that more work is done, see :meth:`update`."""
        self.update(self.done + work, text)

    def update(self, done: float, text: Callable[[], str] = str) -> None:
        """Show how much work is done, if it is time to.

        Args:
            done: Work that is done, with that of a resumed run.
            text: Returns the state of the step, such as its losses. It is called only if the state is shown.
        """
        self.done = done
        if not self._is_shown:
            return
        now = time.perf_counter()
        finished = not self._is_finished and done >= self.total * (1 - ROUNDING)
        self._is_finished |= finished
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            if finished or now - self._read >= TEXT_SECONDS:
                self._read = now
                self._bar.update(self._task, description=self._join(text(), self._rate(now)))
        if finished or self._is_due(now):
            self._logged, self._logged_work = now, done
            line = f'{self.title}: {self._join(text(), self._rate(now), f"{done / self.total:.0%}", self._time(now))}'
            is_quick = finished and now - self._began < QUICK_SECONDS
            self.logger.info(line, extra=FILE_ONLY if is_quick or self._bar is not None else None)

    def _is_due(self, now: float) -> bool:
        silent = now - self._logged
        moved = self.done - self._logged_work >= LINE_SHARE * (self.total - self.start)
        return silent >= MAX_LINE_SECONDS or (silent >= LINE_SECONDS and moved)

    def _rate(self, now: float) -> str:
        amount = (self.done - self.start) * self.units / self.total
        return f'{amount / max(now - self._began, 1e-9):.3g} {self.unit}/s'

    def _time(self, now: float) -> str:
        passed, left = now - self._began, self.total - self.done
        if left <= 0 or self.done <= self.start:
            return f'took {duration(passed)}'
        return f'{duration(passed / (self.done - self.start) * left)} left'

    @staticmethod
    def _join(*texts: str) -> str:
        return ', '.join(filter(None, texts))


class PhaseProgress:
    """Progress of functions that call ``on_progress(phase, done, total)``: one :class:`ConsoleProgress` per phase.

    Args:
        logger: Receives the lines.
        titles: Title of each phase.
        unit: Name of its steps, in the plural.
    """

    def __init__(self, logger: logging.Logger, titles: Mapping[str, str], unit: str) -> None:
        self.logger = logger
        self.titles = titles
        self.unit = unit
        self._shown: tuple[str, ConsoleProgress] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown[1].__exit__(kind, error, trace)
            self._shown = None

    def update(self, phase: str, done: int, total: int) -> None:
        """Show how many steps of a phase are done.

        Args:
            phase: A key of ``titles``.
            done: Number of its steps that are done; 0 when it begins.
            total: Number of all of them.
        """
        if not total:
            return
        if self._shown is None or self._shown[0] != phase:
            self.__exit__(None, None, None)
            self._shown = phase, ConsoleProgress(self.logger, self.titles[phase], total, self.unit).__enter__()
        if done:
            self._shown[1].update(done, lambda: f'{done}/{total}')
        if done >= total:
            self.__exit__(None, None, None)


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes, hours or days, for a message."""
    for unit, length, longest in (('s', 1, 90), ('min', 60, 5400), ('h', 3600, 48 * 3600)):
        if seconds < longest:
            return f'{seconds / length:.{1 if unit == "h" else 0}f} {unit}'
    return f'{seconds / 86400:.0f} days'
