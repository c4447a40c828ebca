# SPDX-License-Identifier: Apache-2.0
"""What the console shows: progress of long steps as a bar or as lines, and no dumps."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.runner import Runner
from rich.console import Console
from torch import nn

from mmzsq.engine.console import FILE_ONLY, ConsoleProgress, PhaseProgress, shorten_console
from mmzsq.engine.runner import ZeroShotRunner


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr('mmzsq.engine.console.time.perf_counter', clock)
    return clock


@pytest.fixture
def shown() -> io.StringIO:
    """What the console handler of a run writes."""
    return io.StringIO()


@pytest.fixture
def logger(shown: io.StringIO) -> logging.Logger:
    """Logger of a run."""
    logger = logging.Logger('console')
    logger.addHandler(logging.StreamHandler(shown))
    shorten_console(logger)
    return logger


def test_the_console_lacks_what_the_file_has(tmp_path: Path) -> None:
    shown = io.StringIO()

    class Quiet(Runner):
        def build_logger(self, *args: object, **kwargs: object) -> logging.Logger:  # type: ignore[override]
            logger = super().build_logger(*args, **kwargs)
            (console,) = (h for h in logger.handlers if not isinstance(h, logging.FileHandler))
            console.setStream(shown)  # type: ignore[attr-defined]
            assert shorten_console(logger) is not None
            return logger

    runner = Quiet(nn.Linear(1, 1), str(tmp_path), experiment_name='quiet_console')
    runner.logger.info('a line of the run')
    runner.logger.info('a table of layers', extra=FILE_ONLY)
    runner.logger.info('Saving checkpoint at 3 epochs')
    (file,) = tmp_path.rglob('*.log')
    for text in ('System environment', 'Hooks will be executed', 'a table of layers', 'Saving checkpoint'):
        assert text in file.read_text()
        assert text not in shown.getvalue()
    assert 'a line of the run' in shown.getvalue() and 'a line of the run' in file.read_text()
    assert ZeroShotRunner.build_logger is not Runner.build_logger


def test_lines_come_with_each_tenth_but_not_too_often(clock: Clock, logger: logging.Logger, shown: io.StringIO) -> None:
    with ConsoleProgress(logger, 'training', 100, 'images', units=400) as progress:
        for done in range(1, 101):
            clock.now = 10.0 * done
            progress.advance(1, lambda: f'loss={done}')  # noqa: B023
    lines = shown.getvalue().splitlines()
    assert lines[0] == 'training: loss=10, 0.4 images/s, 10%, 15 min left'
    assert lines[-1] == 'training: loss=100, 0.4 images/s, 100%, took 17 min'
    assert len(lines) == 10


def test_quick_steps_get_one_line(clock: Clock, logger: logging.Logger, shown: io.StringIO) -> None:
    with ConsoleProgress(logger, 'quick', 100, 'steps') as progress:
        for _ in progress.each(range(100)):
            clock.now += 0.1
    assert shown.getvalue() == 'quick: 10 steps/s, 100%, took 10 s\n'


def test_slow_steps_are_never_silent_for_long(clock: Clock, logger: logging.Logger, shown: io.StringIO) -> None:
    with ConsoleProgress(logger, 'slow', 1000, 'steps') as progress:
        for _ in progress.each(range(10)):
            clock.now += 300
    assert [line.split(', ')[1] for line in shown.getvalue().splitlines()] == ['0%', '0%', '1%', '1%', '1%']


def test_losses_are_read_only_for_a_line(clock: Clock, logger: logging.Logger) -> None:
    """Reading one waits for the GPU."""
    read = []
    with ConsoleProgress(logger, 'training', 1000, 'images') as progress:
        for done in range(1000):
            clock.now += 0.01
            progress.update(done + 1, lambda: read.append(1) or '')
    assert len(read) == 1


def test_a_resumed_step_counts_only_its_own_work(clock: Clock, logger: logging.Logger, shown: io.StringIO) -> None:
    with ConsoleProgress(logger, 'training', 100, 'iterations', start=80) as progress:
        clock.now = 20.0
        progress.update(90)
    assert shown.getvalue() == 'training: 0.5 iterations/s, 90%, 20 s left\n'


def test_a_terminal_gets_a_bar_and_the_log_file_the_lines(
    clock: Clock, logger: logging.Logger, tmp_path: Path, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'stdout', shown)
    logger.addHandler(logging.FileHandler(tmp_path / 'run.log'))
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=100)
    with ConsoleProgress(logger, 'training', 10, 'images', console=console) as progress:
        clock.now = 20.0
        progress.update(5, lambda: 'loss=0.5')
        logger.warning('a warning in the middle')
        progress.update(10, lambda: 'loss=0.25')
    assert logger.handlers[0].stream is shown  # type: ignore[attr-defined]
    assert 'training' in drawn.getvalue() and '100% loss=0.25, 0.5 images/s' in drawn.getvalue()
    # Above the bar, not through it.
    assert 'a warning in the middle' in drawn.getvalue()
    assert shown.getvalue() == ''
    assert (tmp_path / 'run.log').read_text().splitlines() == [
        'training: loss=0.5, 0.25 images/s, 50%, 20 s left',
        'a warning in the middle',
        'training: loss=0.25, 0.5 images/s, 100%, took 20 s',
    ]


def test_a_terminal_is_restored_after_an_error(
    logger: logging.Logger, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'stdout', shown)
    drawn = io.StringIO()
    progress = ConsoleProgress(logger, 'training', 10, 'images', console=Console(file=drawn, force_terminal=True))

    def fail() -> None:
        assert sys.stdout is not shown
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress:
        fail()
    assert sys.stdout is shown and logger.handlers[0].stream is shown  # type: ignore[attr-defined]
    # The cursor is shown again.
    assert drawn.getvalue().endswith('\x1b[?25h')


@pytest.mark.parametrize('is_terminal', [False, True])
def test_only_rank_0_shows_progress(
    logger: logging.Logger, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, shown: io.StringIO
) -> None:
    monkeypatch.setattr('mmzsq.engine.console.get_rank', lambda: 1)
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=is_terminal)
    with ConsoleProgress(logger, 'training', 1, 'images', console=console) as progress:
        progress.advance(1, lambda: pytest.fail('a loss is read'))
    assert drawn.getvalue() == shown.getvalue() == ''


def test_each_phase_has_its_own_progress(clock: Clock, logger: logging.Logger, shown: io.StringIO) -> None:
    def work(on_progress: Any) -> None:
        for phase, total in (('bits', 2), ('layers', 4)):
            on_progress(phase, 0, total)
            for done in range(1, total + 1):
                clock.now += 10
                on_progress(phase, done, total)

    with PhaseProgress(logger, dict(bits='initializing bits', layers='measuring layers'), 'steps') as progress:
        work(progress.update)
    assert shown.getvalue().splitlines() == [
        'initializing bits: 2/2, 0.1 steps/s, 100%, took 20 s',
        'measuring layers: 2/4, 0.1 steps/s, 50%, 20 s left',
        'measuring layers: 4/4, 0.1 steps/s, 100%, took 40 s',
    ]
