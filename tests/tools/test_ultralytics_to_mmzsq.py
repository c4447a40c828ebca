# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from mmzsq.checkpoint import load_from_local


def run(repo: Path, *args: object) -> subprocess.CompletedProcess:
    tool = repo / 'tools/model_converters/ultralytics_to_mmzsq.py'
    command = [sys.executable, str(tool), *map(str, args)]
    env = {**os.environ, 'PYTHONPATH': str(repo)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_both_formats_hold_the_same_weights_and_classes(repo: Path, shared: Path, tmp_path: Path) -> None:
    loaded = []
    for name in ('new/a.safetensors', 'a.pth'):
        done = run(repo, shared / 'weights/yolov5n.pt', tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert 'YOLOv5-n, 80 classes, 349 tensors' in done.stdout
        loaded.append(load_from_local(str(tmp_path / name)))
    first, second = loaded
    assert first['meta']['dataset_meta'] == second['meta']['dataset_meta']
    assert first['meta']['dataset_meta']['classes'][15] == 'cat'
    assert first['state_dict'].keys() == second['state_dict'].keys()
    for name, tensor in first['state_dict'].items():
        assert torch.equal(tensor, second['state_dict'][name])


def test_a_malicious_file_is_refused_in_one_message(repo: Path, tmp_path: Path) -> None:
    mark = tmp_path / 'mark'
    with zipfile.ZipFile(tmp_path / 'evil.pt', 'w') as archive:
        archive.writestr('a/data.pkl', f'cposix\nsystem\n(Vtouch {mark}\ntR.')
    done = run(repo, tmp_path / 'evil.pt', tmp_path / 'out.safetensors')
    assert done.returncode == 2
    assert 'posix.system' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not mark.exists()
    assert not (tmp_path / 'out.safetensors').exists()


def test_an_unknown_suffix_is_refused(repo: Path, tmp_path: Path) -> None:
    done = run(repo, tmp_path / 'a.pt', tmp_path / 'out.onnx')
    assert done.returncode == 2
    assert '.safetensors, .pth' in done.stderr
