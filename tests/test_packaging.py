# SPDX-License-Identifier: Apache-2.0
"""Tests of the wheel: its files, and its requirements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path
from typing import Any
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
    contents = {archive.read(name) for name in archive.namelist()}
    assert not contents & {path.read_bytes() for path in (repo / 'benchmarks').glob('*.py')}
    assert not [name for name in names if name.endswith(('.json', '.png', '.jpg'))]


def test_no_package_of_openmmlab_is_required(archive: ZipFile) -> None:
    """pip would write their files over those of other distributions, so they are extras."""
    metadata = read_metadata(archive)
    extras: dict[str, set[str]] = {}
    for line in metadata.get_all('Requires-Dist') or []:
        requirement, _, condition = line.partition(';')
        extra = condition.partition('==')[2].strip(' "')
        extras.setdefault(extra, set()).add(re.split(r'[<>=! ]', requirement)[0].replace('_', '-'))
    assert 'torch' in extras['']
    openmmlab = {extra: {name for name in names if re.match('mm[cde]|onedl', name)} for extra, names in extras.items()}
    assert {extra: names for extra, names in openmmlab.items() if names} == {
        'stock': {'mmengine', 'mmdet'},
        'lite': {'mmengine', 'mmdet', 'mmcv-lite'},
        # mmcv-lite requires the stock mmengine.
        'onedl': {'onedl-mmengine', 'onedl-mmdetection'},
    }
    assert metadata['License'] == 'Apache-2.0' or metadata['License-Expression'] == 'Apache-2.0'


def test_an_installed_wheel_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    printed = run_python(installed, tmp_path, '-m', 'mmzsq.base', 'w4a8')
    assert printed == str(installed / 'mmzsq' / '.mim' / 'configs' / '_base_' / 'zsq_w4a8.py')


def test_mmengine_alone_finds_the_pure_python_bases(installed: Path, tmp_path: Path) -> None:
    """MMDetection's own tools import no other package before they read a config."""
    (tmp_path / 'leaf.py').write_text(
        'from mmengine.config import read_base\n\nwith read_base():\n    from mmzsq.configs.zsq_w5a5 import *\n'
    )
    code = (
        'import sys; from mmengine.config import Config; cfg = Config.fromfile("leaf.py"); '
        'assert "mmzsq" not in sys.modules; print(cfg.zsq.quantizer.w_bits, cfg.runner_type)'
    )
    assert run_python(installed, tmp_path, '-c', code) == '5 mmzsq.ZeroShotRunner'


def test_the_commands_of_an_installed_wheel_run(installed: Path, repo: Path, tmp_path: Path) -> None:
    """Without the repository: in an empty folder, from the files of the wheel alone."""
    environment = run_python(installed, tmp_path, '-m', 'mmzsq.env')
    assert f'mmzsq: {version_of(repo)}' in environment.splitlines()
    assert '--rehearse' in run_python(installed, tmp_path, '-m', 'mmzsq.train', '--help')
    (tmp_path / 'leaf.py').write_text(
        "_base_ = ['mmzsq::shapes/yolov5-p_shapes.py', 'mmzsq::_base_/zsq_w4a4.py']\n"
        "load_from = 'mmzsq://yolov5-p_shapes.safetensors'\n"
    )
    code = (
        'import mmzsq; from mmengine.config import Config; from mmzsq.config import compose; '
        'cfg = compose(Config.fromfile("leaf.py")); print(mmzsq.__file__, cfg.model.type, cfg.model.quantizer.w_bits)'
    )
    expected = f'{installed / "mmzsq" / "__init__.py"} mmzsq.ZeroShotDetector 4'
    assert run_python(installed, tmp_path, '-c', code) == expected


def test_a_command_without_mmdetection_ends_with_one_message(installed: Path, tmp_path: Path) -> None:
    (tmp_path / 'mmdet.py').write_text("raise ModuleNotFoundError('no module', name='mmdet')")
    paths = os.pathsep.join(map(str, (tmp_path, installed)))
    ended = subprocess.run(
        [sys.executable, '-m', 'mmzsq.env'], env=dict(os.environ, PYTHONPATH=paths), capture_output=True, text=True
    )
    assert ended.returncode == 2 and 'Traceback' not in ended.stderr
    assert ended.stderr.startswith('error: mmdet is not installed.') and "pip install 'mmzsq[lite]'" in ended.stderr


def test_the_long_description_is_the_readme(archive: ZipFile, repo: Path) -> None:
    metadata = read_metadata(archive)
    assert metadata['Description-Content-Type'] == 'text/markdown'
    assert metadata.get_payload().strip() == (repo / 'README.md').read_text().strip()
    assert metadata['Version'] == version_of(repo)
    pythons = {text.rpartition(' ')[2] for text in metadata.get_all('Classifier') or [] if ':: Python :: 3.' in text}
    assert pythons == {'3.10', '3.11', '3.12', '3.13'} and metadata['Requires-Python'] == '>=3.10'


def version_of(repo: Path) -> str:
    return re.search("__version__ = '(.*)'", (repo / 'mmzsq' / 'version.py').read_text())[1]  # type: ignore[index]


def read_metadata(archive: ZipFile) -> Any:
    [name] = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
    return message_from_string(archive.read(name).decode())


def run_python(installed: Path, folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()
