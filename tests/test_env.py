# SPDX-License-Identifier: Apache-2.0
"""``python -m mmzsq.env`` prints what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch
import yaml

from mmzsq import env
from mmzsq.version import __version__


def test_versions_and_devices_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, 'PACKAGES', (*env.PACKAGES, 'no-such-package'))
    env.main()
    printed = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ': ' in line)
    assert printed['mmzsq'] == __version__
    assert printed['torch'] == importlib.metadata.version('torch')
    assert printed['PyTorch'] == torch.__version__
    assert printed['Python'].split()[0] == sys.version.split()[0]
    assert printed['CUDA available'] == str(torch.cuda.is_available())
    assert printed['no-such-package'] == 'not installed'
    assert 'threads' in printed['Processor']


def test_templates_ask_for_it_and_the_citation_names_the_version(repo) -> None:  # type: ignore[no-untyped-def]
    bug = yaml.safe_load((repo / '.github' / 'ISSUE_TEMPLATE' / 'bug_report.yml').read_text(encoding='utf-8'))
    assert any('python -m mmzsq.env' in str(part) for part in bug['body'])
    citation = yaml.safe_load((repo / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == __version__
