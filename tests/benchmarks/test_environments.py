# SPDX-License-Identifier: Apache-2.0
"""The matrix of environments: which are skipped, what is reported, and what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import environments
import pytest
import yaml


def test_the_matrix_covers_all_promised_pythons_and_distributions(repo: Path) -> None:
    promised = [
        line.split('::')[-1].strip(" ',").strip()
        for line in (repo / 'setup.py').read_text().splitlines()
        if 'Programming Language :: Python :: 3.' in line
    ]
    assert {row.python for row in environments.MATRIX.values()} == set(promised)
    packages = ' '.join(' '.join(row.packages) for row in environments.MATRIX.values())
    assert all(extra in packages for extra in ('[lite]', '[onedl]', 'mmyolo=='))
    oldest = next(
        line for line in (repo / 'requirements' / 'runtime.txt').read_text().splitlines() if 'torch>=' in line
    )
    assert oldest.replace('>=', '==') + '.0' in packages


def test_a_missing_interpreter_is_skipped_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environments, 'MATRIX', {'future': environments.Environment('3.99', ())})
    assert environments.main(['--root', str(tmp_path), '--out', str(tmp_path / 'rows.json')]) == 0
    assert 'future: no Python 3.99 on this machine' in capsys.readouterr().out
    [row] = json.loads((tmp_path / 'rows.json').read_text())
    assert 'versions' not in row


def test_a_failed_step_is_named_and_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # This interpreter stands in for an environment that cannot import the package.
    (tmp_path / 'broken' / 'bin').mkdir(parents=True)
    python = tmp_path / 'broken' / 'bin' / 'python'
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "raise ImportError(\'no mmdet here\')"\n')
    python.chmod(0o755)
    monkeypatch.setattr(environments, 'MATRIX', {'broken': environments.Environment('3.11', ())})
    assert environments.main(['--no-install', '--root', str(tmp_path)]) == 1
    assert 'ImportError: no mmdet here' in capsys.readouterr().out.splitlines()[-1]
    assert 'no mmdet here' in (tmp_path / 'broken_runs' / 'log.txt').read_text()


def test_this_interpreter_is_found() -> None:
    assert environments.find_python(f'{sys.version_info.major}.{sys.version_info.minor}') == sys.executable
    assert environments.find_python('3.99') is None


def test_the_outcomes_of_all_groups_are_added_up() -> None:
    output = (
        '5 passed in 0.10s\n'
        '2 failed, 3 passed, 1 skipped, 9 deselected, 4 warnings in 75.25s (0:01:15)\n'
        'a test printed: 7 passed in vain\n'
        '=========== 1 passed, 1 error in 2.00s ===========\n'
    )
    assert environments.count_tests(output) == dict(passed=9, failed=2, skipped=1, error=1)


def test_the_workflow_runs_all_checks_with_both_distributions(repo: Path) -> None:
    [job] = yaml.safe_load((repo / '.github' / 'workflows' / 'tests.yml').read_text())['jobs'].values()
    [extra] = [name for name, value in job['env'].items() if value == '${{ matrix.extra }}']
    assert [step['run'] for step in job['steps'] if 'run' in step] == ['.ci/run']
    assert job['strategy']['matrix'] == dict(extra=['stock', 'onedl'])
    folders = set()
    for name in job['strategy']['matrix']['extra']:
        # Without the variables of a make that runs these tests.
        variables = dict(PATH=os.environ['PATH'], PYTHON=sys.executable) | {extra: name}
        command = ['make', '--dry-run', '--always-make', 'test']
        lines = subprocess.run(command, cwd=repo, env=variables, capture_output=True, text=True, check=True).stdout
        [line] = [line for line in lines.splitlines() if '--editable' in line]
        assert f"'.[{name},deploy]'" in line
        folders.add(line.split()[0])
    assert len(folders) == 2
