# SPDX-License-Identifier: Apache-2.0
"""A restart gives the same bits after any interruption while a calibration set is written.

Run as a program, this file writes a set, slowly, to be killed.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet

NUM_IMAGES, SHARD_SIZE = 5, 2


def write(root: Path, seconds_a_shard: float = 0.0) -> None:
    """Start or continue a set whose content depends only on the index of each shard."""
    calibration_set = CalibrationSet.open(
        root,
        fingerprint=dict(seed=0),
        num_images=NUM_IMAGES,
        shard_size=SHARD_SIZE,
        classes=['cat', 'dog'],
    )
    for index in calibration_set.missing_shards():
        time.sleep(seconds_a_shard)
        count = calibration_set.shard_length(index)
        images = np.random.default_rng(index).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        label = InstanceData(bboxes=torch.tensor([[1.0, 2, 9 + index, 10]]), labels=torch.tensor([index % 2]))
        calibration_set.write_shard(index, images, [label] * count)
    calibration_set.merge()


def content(root: Path) -> dict[str, bytes]:
    """Every file below ``root``, hidden ones included."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def die_at_system_call(root: Path, number: int) -> bool:
    """Write a set in a process that is killed at its disk access ``number``.

    Of a file that it was about to force to the disk, half is lost.

    Returns:
        False if the process came to its end before.
    """
    real_fsync = os.fsync
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    if call is real_fsync and stat.S_ISREG(os.fstat(args[0]).st_mode):
                        # What is not forced to the disk may be lost with the power.
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        try:
            for name in ('fsync', 'replace', 'unlink', 'mkdir'):
                setattr(os, name, deadly(getattr(os, name)))
            write(root)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_after_a_kill_at_any_step_the_set_ends_with_the_same_bits(tmp_path):
    write(tmp_path / 'whole')
    whole = content(tmp_path / 'whole')
    step = 1
    while die_at_system_call(tmp_path / str(step), step):
        root = tmp_path / str(step)
        if (root / 'manifest.json').exists():
            CalibrationSet.load(root).verify()
        for record in (root / 'shards').glob('0*.json'):
            # A shard that counts is there with all its images, as they are to be.
            assert record.read_bytes() == whole[f'shards/{record.name}']
            first = int(record.stem) * SHARD_SIZE
            for image in range(first, min(first + SHARD_SIZE, NUM_IMAGES)):
                name = f'images/{image:06d}.png'
                assert (root / name).read_bytes() == whole[name]
        write(root)
        assert content(root) == whole
        step += 1
    # Each of 5 images, 3 records, settings, annotations and manifest: written, renamed, recorded.
    assert step > 3 * 11


def test_kill_9_from_outside_loses_at_most_the_shard_in_work(tmp_path, repo):
    write(tmp_path / 'whole')
    root = tmp_path / 'killed'
    writer = subprocess.Popen([sys.executable, __file__, str(root)], env={**os.environ, 'PYTHONPATH': str(repo)})
    deadline = time.monotonic() + 60
    while not (root / 'shards' / '00000.json').exists():
        assert writer.poll() is None, 'the writer ended by itself'
        assert time.monotonic() < deadline, 'the writer wrote nothing'
        time.sleep(0.01)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert not (root / 'manifest.json').exists()
    names = ('shards/00000.json', 'images/000000.png', 'images/000001.png')
    kept = {root / name: (root / name).stat().st_mtime_ns for name in names}
    write(root)
    assert content(root) == content(tmp_path / 'whole')
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize('function', ['fsync', 'replace'])
@pytest.mark.parametrize('call', range(1, 12, 2))
def test_a_full_disk_is_reported_and_written_files_are_kept(tmp_path, monkeypatch, function, call):
    write(tmp_path / 'whole')
    root = tmp_path / 'set'
    real = getattr(os, function)
    calls = 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(UserError, match='cannot write') as caught:
            write(root)
    message = str(caught.value)
    assert 'No space left on device' in message
    assert str(root) in message
    assert 'Files written before are kept' in message
    assert not list(root.rglob('.*.tmp'))
    kept = {path: path.stat().st_mtime_ns for path in root.glob('shards/0*.json')}
    write(root)
    assert content(root) == content(tmp_path / 'whole')
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_file_systems_that_cannot_sync_directories_are_fine(tmp_path, monkeypatch):
    real = os.fsync

    def sync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', sync_files_only)
    write(tmp_path / 'set')
    CalibrationSet.load(tmp_path / 'set').verify()


def test_an_unwritable_directory_is_reported(tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(UserError, match='cannot write .*Not a directory'):
        write(tmp_path / 'file' / 'set')


if __name__ == '__main__':
    write(Path(sys.argv[1]), seconds_a_shard=0.5)
