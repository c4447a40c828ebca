# SPDX-License-Identifier: Apache-2.0
"""MMEngine's dumps are in the log file and not on the console."""

from __future__ import annotations

import io
import logging
from pathlib import Path

from mmengine.runner import Runner
from torch import nn

from mmzsq.engine.console import shorten_console
from mmzsq.engine.runner import ZeroShotRunner


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
    (file,) = tmp_path.rglob('*.log')
    for text in ('System environment', 'Hooks will be executed'):
        assert text in file.read_text()
        assert text not in shown.getvalue()
    assert 'a line of the run' in shown.getvalue() and 'a line of the run' in file.read_text()
    assert ZeroShotRunner.build_logger is not Runner.build_logger
