# SPDX-License-Identifier: Apache-2.0
"""Runs of pure-Python configs, with ``default_scope = None``: the set, and all tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mmdet.utils import register_all_modules
from pure_python_project import SHRUNK, make_project

from mmzsq import cli, export, generate, predict, test, train


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_all_modules()
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, tool: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['tool', *arguments])
    cli.run(tool.main)


def test_a_second_run_accepts_the_set_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_project(tmp_path, 'faster_rcnn')
    for _ in range(2):
        call(monkeypatch, generate, 'leaf.py', '--work-dir', 'out')
    assert len(list((tmp_path / 'out/calibration_set/images').glob('*.png'))) == 2
    # The config that the run wrote means the same set.
    call(monkeypatch, generate, 'out/leaf.py', '--work-dir', 'out')


@pytest.mark.nightly
@pytest.mark.parametrize('name', SHRUNK)
def test_all_tools_take_a_pure_python_config(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_project(tmp_path, name)
    call(monkeypatch, train, 'leaf.py', '--work-dir', 'out')
    checkpoint = (tmp_path / 'out/last_checkpoint').read_text()
    longer = ('--cfg-options', 'zsq.train.max_epochs=2')
    call(monkeypatch, train, 'leaf.py', '--work-dir', 'out', '--resume', *longer)
    assert (tmp_path / 'out/epoch_2.pth').is_file()
    scores = []
    for index, config in enumerate(('leaf.py', 'out/leaf.py')):
        call(monkeypatch, test, config, checkpoint, '--work-dir', f'tested_{index}')
        [written] = (tmp_path / f'tested_{index}').glob('*/*.json')
        scores.append(json.loads(written.read_text())['coco/bbox_mAP'])
    assert scores[0] == scores[1]
    call(monkeypatch, test, f'tiny_{name}.py', 'teacher.pth', '--work-dir', 'tested_float')
    call(monkeypatch, predict, checkpoint, 'images', '--config', 'leaf.py', '--out', 'pictures')
    assert (tmp_path / 'pictures/predictions.json').is_file()
    call(monkeypatch, export, 'leaf.py', checkpoint, '--work-dir', 'exported')
    assert list((tmp_path / 'exported').glob('*.onnx')) or list((tmp_path / 'out').glob('*.onnx'))
