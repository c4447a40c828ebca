# SPDX-License-Identifier: Apache-2.0
"""The wheel carries all that a user needs, and requires nothing that breaks an installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

CARRIED = {'configs': ('.py', '.yml', '.md'), 'tools': ('.py', '.sh')}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel, built from a copy of the tree so that nothing is left in it."""
    repo = Path(__file__).resolve().parents[1]
    copy = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(repo / name, copy)
    shutil.copy(repo / 'model-index.yml', copy)
    for name in ('mmzsq', 'configs', 'tools', 'requirements', 'tests'):
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(repo / name, copy / name, symlinks=True, ignore=ignored)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q']
    subprocess.run([*command, '-w', copy / 'dist', copy], check=True, timeout=300)
    return ZipFile(next((copy / 'dist').glob('*.whl')))


def test_every_module_is_carried(wheel: ZipFile, repo: Path) -> None:
    modules = {path.relative_to(repo).as_posix() for path in (repo / 'mmzsq').rglob('*.py')}
    assert {name for name in modules if '/.mim/' not in name} <= set(wheel.namelist())


def test_configs_and_tools_are_carried_where_mim_and_mmengine_look(
    wheel: ZipFile, repo: Path
) -> None:
    for folder, suffixes in CARRIED.items():
        for path in (repo / folder).rglob('*'):
            if path.suffix in suffixes:
                carried = f'mmzsq/.mim/{path.relative_to(repo).as_posix()}'
                assert wheel.read(carried) == path.read_bytes()


def test_the_model_index_names_files_that_are_carried(wheel: ZipFile) -> None:
    index = yaml.safe_load(wheel.read('mmzsq/.mim/model-index.yml'))
    assert index['Import']
    for name in index['Import']:
        assert f'mmzsq/.mim/{name}' in wheel.namelist()


def test_shipped_weights_are_carried(wheel: ZipFile, repo: Path) -> None:
    for path in (repo / 'mmzsq' / 'assets').glob('*'):
        assert wheel.read(f'mmzsq/assets/{path.name}') == path.read_bytes()


def test_nothing_else_is_carried(wheel: ZipFile) -> None:
    tops = {name.split('/')[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith('.dist-info')} == {'mmzsq'}


def test_no_mmcv_is_required(wheel: ZipFile) -> None:
    """``mmcv-lite`` would overwrite a compiled ``mmcv``: it is installed on request only."""
    [name] = [name for name in wheel.namelist() if name.endswith('.dist-info/METADATA')]
    metadata = message_from_string(wheel.read(name).decode())
    wanted = metadata.get_all('Requires-Dist') or []
    assert any(line.startswith('mmdet') for line in wanted)
    assert [line for line in wanted if line.startswith('mmcv')] == [
        'mmcv-lite==2.1.0; extra == "lite"'
    ]
    assert metadata['License'] == 'Apache-2.0' or metadata['License-Expression'] == 'Apache-2.0'


def test_an_installed_wheel_finds_its_configs(wheel: ZipFile, tmp_path: Path) -> None:
    installed = tmp_path / 'site'
    wheel.extractall(installed)
    code = (
        f'import sys\nsys.path.insert(0, {str(installed)!r})\n'
        'from mmzsq.compat import package_configs\n'
        "print(package_configs('mmzsq'))"
    )
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(installed / 'mmzsq' / '.mim' / 'configs')
