# SPDX-License-Identifier: Apache-2.0
"""Checkpoints load through MMEngine's loader without running code, and errors say what to do."""

from __future__ import annotations

import functools
import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file

from mmzsq import checkpoint
from mmzsq.errors import UserError

load = CheckpointLoader.load_checkpoint
needs_safe_loading = pytest.mark.skipif(
    not checkpoint.SAFE_LOADING, reason='torch before 2.6 cannot register safe objects'
)


def test_safetensors_load_in_the_format_of_a_checkpoint(tmp_path: Path) -> None:
    weight = torch.rand(3, 2)
    meta = {'dataset_meta': json.dumps({'classes': ['a', 'b']}), 'note': 'not json'}
    save_file({'conv.weight': weight}, tmp_path / 'w.safetensors', metadata=meta)
    loaded = load(str(tmp_path / 'w.safetensors'), map_location='cpu')
    torch.testing.assert_close(loaded['state_dict']['conv.weight'], weight)
    assert loaded['meta'] == {'dataset_meta': {'classes': ['a', 'b']}, 'note': 'not json'}


def test_a_pth_loads_as_saved(tmp_path: Path) -> None:
    torch.save({'state_dict': {'w': torch.ones(2)}, 'meta': {'epoch': 3}}, tmp_path / 'c.pth')
    loaded = load(str(tmp_path / 'c.pth'), map_location='cpu')
    assert loaded['meta'] == {'epoch': 3}
    assert loaded['state_dict']['w'].tolist() == [1, 1]


class Hostile:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@needs_safe_loading
@pytest.mark.parametrize('legacy', [False, True])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / 'bad.pth'
    torch.save({'w': Hostile(tmp_path / 'ran')}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match='bad.pth'):
        load(str(path))
    assert not (tmp_path / 'ran').exists()


@needs_safe_loading
def test_the_message_names_the_rejected_objects(tmp_path: Path) -> None:
    torch.save({'w': Hostile(tmp_path / 'ran')}, tmp_path / 'bad.pth')
    with pytest.raises(UserError, match=r"mkdir.*Convert.*'state_dict'"):
        load(str(tmp_path / 'bad.pth'))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('share', [0.0, 0.5, 0.95])
def test_a_truncated_file_is_reported(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f'cut{suffix}'
    save = torch.save if suffix == '.pth' else save_file
    save({'w': torch.rand(100)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f'cut{suffix} cannot be read'):
        load(str(path))


def test_a_missing_file_is_reported() -> None:
    with pytest.raises(UserError, match=r'nowhere\.pth does not exist.* load_from=PATH \(zsq.teacher=PATH if'):
        load('nowhere.pth')


def test_shipped_weights_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, 'ASSETS', tmp_path)
    save_file({'w': torch.ones(1)}, tmp_path / 'tiny.safetensors')
    assert load('mmzsq://tiny.safetensors')['state_dict']['w'] == 1
    with pytest.raises(UserError, match=r"no weights 'other\.safetensors'\. It ships: tiny\.safetensors"):
        load('mmzsq://other.safetensors')
    with pytest.raises(UserError, match='ships no weights'):
        load(f'mmzsq://../{tmp_path.name}/tiny.safetensors')


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a server for ``tmp_path/served``; torch caches downloads in ``tmp_path/cache``."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'served').mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'served'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


@needs_safe_loading
def test_a_download_is_kept_and_does_not_run_code(server: str, tmp_path: Path) -> None:
    torch.save({'w': torch.ones(1)}, tmp_path / 'served' / 'good.pth')
    torch.save({'w': Hostile(tmp_path / 'ran')}, tmp_path / 'served' / 'bad.pth')
    assert load(f'{server}/good.pth')['w'] == 1
    (tmp_path / 'served' / 'good.pth').unlink()
    assert load(f'{server}/good.pth')['w'] == 1
    with pytest.raises(UserError, match='mkdir'):
        load(f'{server}/bad.pth')
    assert not (tmp_path / 'ran').exists()


def test_a_failed_download_says_where_to_put_the_file(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'404.*load_from=PATH.*hub/checkpoints/missing\.pth'):
        load(f'{server}/missing.pth')
    assert not list((tmp_path / 'cache').rglob('missing*'))


def test_a_server_that_does_not_respond_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(checkpoint, 'TIMEOUT', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/teacher.pth'
        with pytest.raises(UserError, match=r'cannot download .*teacher\.pth \(.*timed out.*load_from=PATH'):
            load(url)
    assert socket.getdefaulttimeout() is None
