# SPDX-License-Identifier: Apache-2.0
"""Checkpoints load through MMEngine's loader without running code, and errors say what to do."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
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


def state() -> dict[str, torch.Tensor]:
    return {'layer.weight': torch.arange(600.0).reshape(20, 30), 'layer.bias': torch.ones(20)}


def assert_clear(path: Path, reason: str = '') -> None:
    """Reading ends in one message that names the file and has a reason."""
    with pytest.raises(UserError) as found:
        checkpoint.read_checkpoint(path)
    message = str(found.value)
    assert path.name in message
    assert re.search(reason, message), message
    assert not re.search(r'[:(] *(\.|\)|$)', message), message
    assert 'weights_only=False' not in message


@needs_safe_loading
@pytest.mark.parametrize('protocol', [4, 5])
@pytest.mark.parametrize('legacy', [False, True])
def test_other_pickle_protocols_are_named(tmp_path: Path, protocol: int, legacy: bool) -> None:
    torch.save(state(), tmp_path / 'a.pth', pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    assert_clear(tmp_path / 'a.pth', 'protocol 4 or 5' if not legacy else '')


@pytest.mark.parametrize(
    'content',
    [
        *(
            b'',
            b'\0',
            b'\x80',
            b'text',
            b'weights: 1\n',
            b'{"a": 1}',
            b'<html>404</html>',
            b'PK\x03\x04',
            b'PK\x05\x06',
        ),
        *(
            b'\x80\x02.',
            b'\x80\x02]q\x00.',
            b'\x80\x02N.',
            b'\x80\x02Q.',
            b'\x80\x02h\x05.',
            b'\x80\x02X\xff\xff\xff\x7f.',
        ),
        *('ä'.encode('latin-1'), b'\x80\x02(' * 50, b'(' * 100_000, bytes(range(256)), b'version https://git-lfs'),
    ],
)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_of_other_content_are_refused_with_a_reason(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f'a{suffix}'
    path.write_bytes(content)
    assert_clear(path)


@needs_safe_loading
@pytest.mark.parametrize(
    'content',
    [
        *([1], None, 'text', 5, (1, 2), {1: 2}, torch.ones(2), {'state_dict': None}, {'state_dict': [1]}),
        *({'meta': 3}, {'state_dict': {}, 'meta': [1]}, {'state_dict': {}, 'meta': {'mmzsq': 5}}),
        *({'state_dict': {}, 'ema_state_dict': 3}, {'meta': {'note': np.str_('a')}}, {'meta': np.array(['a', None])}),
        *({'meta': {'path': Path('a')}}, {'w': object()}),
    ],
)
def test_checkpoints_of_other_structure_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / 'a.pth')
    assert_clear(tmp_path / 'a.pth')


@needs_safe_loading
def test_any_damage_is_found_or_harmless(tmp_path: Path) -> None:
    """Every flipped bit of a small file: an error with a reason, or the same weights."""
    whole = tmp_path / 'whole.pth'
    torch.save(dict(state_dict=state(), meta=dict(epoch=3)), whole)
    content = whole.read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / 'a.pth'
    refused = 0
    for index in random.choice(len(content), 250, replace=False):
        damaged = bytearray(content)
        damaged[index] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.read_checkpoint(path)
        except UserError:
            refused += 1
        else:
            for name, value in state().items():
                assert torch.equal(loaded['state_dict'][name], value)
    assert refused > 150
    for length in range(0, len(content), 100):
        path.write_bytes(content[:length])
        assert_clear(path)


@needs_safe_loading
def test_a_file_without_check_sums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(checkpoint.read_checkpoint(tmp_path / 'a.pth')['layer.bias'], torch.ones(20))


def test_a_compressed_record_is_refused_before_it_is_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**7))
    monkeypatch.setattr(zipfile.ZipFile, 'open', None)
    monkeypatch.setattr(torch, 'load', None)
    assert path.stat().st_size < 10**5
    assert_clear(path, r'data\.pkl is compressed')


def test_records_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        for index in range(3):
            archive.writestr(f'archive/{index}', bytes(1000))
    # All entries of the directory point to the first record.
    content = bytearray(path.read_bytes())
    entry = content.index(b'PK\x01\x02')
    for _ in range(3):
        content[entry + 42 : entry + 46] = bytes(4)
        entry = content.find(b'PK\x01\x02', entry + 4)
    path.write_bytes(content[: 1000 + 100] + content[content.index(b'PK\x01\x02') :])
    assert_clear(path, 'damaged|cannot be read')


@pytest.mark.parametrize('name', ['s3://bucket/a.pth', 'open-mmlab://nope', 'mmcls://nope', 5, ['a.pth'], {}, None, ''])
def test_other_values_and_schemes_are_refused(name: object) -> None:
    with pytest.raises(UserError, match=r'.+load_from=PATH'):
        checkpoint.read_checkpoint(name)


def test_torch_before_2_6_says_that_it_cannot_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state(), tmp_path / 'a.pth')
    monkeypatch.setattr(checkpoint, 'SAFE_LOADING', False)
    said: list[str] = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda message, **_: said.append(message))
    load(str(tmp_path / 'a.pth'), map_location='cpu')
    assert 'a.pth' in said[0] and 'load only files that you trust' in said[0]


def test_the_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / 'a.pth')
    expected = hashlib.sha256((tmp_path / 'a.pth').read_bytes()).hexdigest()
    assert checkpoint.file_sha256(str(tmp_path / 'a.pth')) == expected
    assert checkpoint.file_sha256('s3://bucket/a.pth') is None
    shipped = checkpoint.ASSETS / 'yolov5-p_shapes.safetensors'
    assert checkpoint.file_sha256(f'mmzsq://{shipped.name}') == hashlib.sha256(shipped.read_bytes()).hexdigest()


@needs_safe_loading
def test_a_damaged_pickle_with_a_fitting_check_sum_ends_in_a_message(tmp_path: Path) -> None:
    torch.save(dict(state_dict=state(), meta=dict(mmzsq=dict(teacher='a'))), tmp_path / 'whole.pth')
    with zipfile.ZipFile(tmp_path / 'whole.pth') as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    random = np.random.default_rng(0)
    path = tmp_path / 'a.pth'
    for _ in range(300):
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in records.items():
                damaged = bytearray(content)
                if name.endswith('data.pkl'):
                    damaged[random.integers(len(damaged))] = random.integers(256)
                archive.writestr(name, bytes(damaged))
        with suppress(UserError):
            checkpoint.read_checkpoint(path)
