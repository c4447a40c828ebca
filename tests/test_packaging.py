# SPDX-License-Identifier: Apache-2.0
"""Tests of the wheel: its files, and its requirements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

CARRIED = {'configs': ('.py', '.yml', '.md'), 'tools': ('.py', '.sh')}


@pytest.fixture(scope='module')
def archive(wheel: Path) -> Iterator[ZipFile]:
    with ZipFile(wheel) as opened:
        yield opened


def test_every_module_is_packaged(archive: ZipFile, repo: Path) -> None:
    modules = {path.relative_to(repo).as_posix() for path in (repo / 'mmzsq').rglob('*.py')}
    assert {name for name in modules if '/.mim/' not in name} <= set(archive.namelist())


def test_configs_and_tools_are_packaged_for_mim_and_mmengine(archive: ZipFile, repo: Path) -> None:
    for folder, suffixes in CARRIED.items():
        for path in (repo / folder).rglob('*'):
            if path.suffix in suffixes:
                carried = f'mmzsq/.mim/{path.relative_to(repo).as_posix()}'
                assert archive.read(carried) == path.read_bytes()


def test_the_model_index_names_packaged_files(archive: ZipFile) -> None:
    index = yaml.safe_load(archive.read('mmzsq/.mim/model-index.yml'))
    assert index['Import']
    for name in index['Import']:
        assert f'mmzsq/.mim/{name}' in archive.namelist()


def test_shipped_weights_are_packaged(archive: ZipFile, repo: Path) -> None:
    for path in (repo / 'mmzsq' / 'assets').glob('*'):
        assert archive.read(f'mmzsq/assets/{path.name}') == path.read_bytes()


def test_templates_of_the_report_are_packaged(archive: ZipFile, repo: Path) -> None:
    templates = list((repo / 'mmzsq' / 'report' / 'templates').iterdir())
    assert len(templates) == 4
    for path in templates:
        assert archive.read(f'mmzsq/report/templates/{path.name}') == path.read_bytes()


def test_nothing_else_is_packaged(archive: ZipFile) -> None:
    tops = {name.split('/')[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'mmzsq'}


def test_benchmarks_and_their_results_are_left_out(archive: ZipFile, repo: Path) -> None:
    names = {Path(name).name for name in archive.namelist()}
    assert not names & {path.name for path in (repo / 'benchmarks').glob('*.py')}
    assert not [name for name in names if name.endswith(('.json', '.png', '.jpg'))]


def test_no_mmcv_is_required(archive: ZipFile) -> None:
    """``mmcv-lite`` would overwrite a compiled ``mmcv``, so it is an extra."""
    [name] = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
    metadata = message_from_string(archive.read(name).decode())
    wanted = metadata.get_all('Requires-Dist') or []
    assert any(line.startswith('mmdet') for line in wanted)
    assert [line for line in wanted if line.startswith('mmcv')] == ['mmcv-lite==2.1.0; extra == "lite"']
    assert metadata['License'] == 'Apache-2.0' or metadata['License-Expression'] == 'Apache-2.0'


def test_an_installed_wheel_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    code = "from mmzsq.compat import package_configs; print(package_configs('mmzsq'))"
    result = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(installed / 'mmzsq' / '.mim' / 'configs')
