# SPDX-License-Identifier: Apache-2.0
"""Files that a run writes beside its checkpoints are complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmzsq.engine.hooks.quantizer_init_hook import PTQ_FILE, REPORT_FILE
from mmzsq.engine.report import RESULTS_FILE

FILES = (PTQ_FILE, REPORT_FILE, RESULTS_FILE)
NO_EVALUATION = {'val_dataloader': None, 'val_cfg': None, 'val_evaluator': None}


class Killed(BaseException):
    """Ends a run as a signal does."""


@pytest.mark.parametrize('name', FILES)
def test_a_kill_while_a_file_is_written_leaves_no_half_of_it(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The kill comes after the content is written, before the file gets its name."""
    replace = os.replace

    def kill(unfinished: Path, path: Path) -> None:
        if Path(path).name == name:
            raise Killed
        replace(unfinished, path)

    monkeypatch.setattr(os, 'replace', kill)
    runner = make_runner('out', **NO_EVALUATION)
    with pytest.raises(Killed):
        runner.train()
    assert not Path('out', name).exists()


def test_files_of_a_finished_run_can_be_read(make_runner: Any) -> None:
    Path('out').mkdir()
    unfinished = Path('out', f'.{PTQ_FILE}.0123.tmp')
    unfinished.write_bytes(b'half')
    make_runner('out', **NO_EVALUATION).train()
    assert not unfinished.exists()
    state = torch.load(Path('out', PTQ_FILE), weights_only=True)['state_dict']
    assert any('weight_quantizer.' in key for key in state)
    for name in (REPORT_FILE, RESULTS_FILE):
        assert json.loads(Path('out', name).read_text())
