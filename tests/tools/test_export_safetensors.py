# SPDX-License-Identifier: Apache-2.0
"""The export of a training checkpoint, run as the command line runs it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mmzsq.checkpoint import load_from_local

WEIGHT = torch.arange(6.0).reshape(2, 3)
TOOL = 'tools/model_converters/export_safetensors.py'


def export(repo: Path, checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, str(checkpoint), str(out)])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


def test_weights_and_class_names_are_exported(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = {
        'state_dict': {'turned': WEIGHT.t(), 'weight': WEIGHT, 'count': torch.tensor(3)},
        'meta': {'epoch': 2, 'dataset_meta': {'classes': ('disc', 'ring')}},
        'optimizer': {'state': {0: {'exp_avg': WEIGHT}}},
    }
    torch.save(checkpoint, tmp_path / 'epoch_2.pth')
    out = tmp_path / 'new' / 'weights.safetensors'
    export(repo, tmp_path / 'epoch_2.pth', out, monkeypatch)

    exported = load_from_local(str(out))
    assert exported['meta'] == {'dataset_meta': {'classes': ['disc', 'ring']}}
    assert exported['state_dict'].keys() == checkpoint['state_dict'].keys()
    for name, tensor in checkpoint['state_dict'].items():
        assert torch.equal(exported['state_dict'][name], tensor)
    assert [file.name for file in out.parent.iterdir()] == ['weights.safetensors']


@pytest.mark.parametrize(
    ('checkpoint', 'name', 'message'),
    [
        ({'weights': {}}, 'a.safetensors', 'has no state_dict'),
        ({'state_dict': {'w': WEIGHT}}, 'a.safetensors', 'does not name its classes'),
        ({}, 'a.onnx', 'must end in one of .safetensors'),
    ],
)
def test_a_mistake_is_one_message(
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: dict,
    name: str,
    message: str,
) -> None:
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    with pytest.raises(SystemExit, match='2'):
        export(repo, tmp_path / 'checkpoint.pth', tmp_path / name, monkeypatch)
    assert re.match(f'error: .*{message}', capsys.readouterr().err)
    assert not (tmp_path / name).exists()
