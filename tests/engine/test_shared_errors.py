# SPDX-License-Identifier: Apache-2.0
"""Two processes: an error of one ends both, and files that are damaged before the merge are made again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmzsq.engine.shared_errors import on_main, raise_on_all_ranks
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet

SCRIPT = """
import json
import os
from pathlib import Path
import mmzsq
from mmengine.config import Config
from mmengine.dist import barrier
from mmzsq import cli
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet

Config.pretty_text = property(lambda cfg: '')
rank = int(os.environ['RANK'])
runner = cli.build_runner(Config.fromfile('config.py'))
images = Path(runner.cfg.zsq.calibration_set.dir, 'images')
write_shard = CalibrationSet.write_shard
outcomes = []

def generate():
    barrier()
    try:
        runner.generate()
        outcomes.append(None)
    except (OSError, UserError) as error:
        outcomes.append([str(error), getattr(error, 'shown_by_peer', False)])
    barrier()

def damage():
    # One image of each shard, that is of each process.
    if rank == 0:
        for name in ('000003.png', '000035.png'):
            (images / name).write_bytes(b'damaged')

def fail(self, index, *args):
    if rank == 1:
        raise OSError(28, 'No space left on device')
    write_shard(self, index, *args)

def damage_once(self, index, *args):
    write_shard(self, index, *args)
    CalibrationSet.write_shard = write_shard
    if rank == 1:
        (images / '000035.png').write_bytes(b'damaged')

generate()
damage()
generate()
# Do as the message says.
if rank == 0:
    for name in ('000003.png', '000035.png'):
        (images / name).unlink()
CalibrationSet.write_shard = fail
generate()
CalibrationSet.write_shard = damage_once
generate()
Path(f'outcomes_{rank}.json').write_text(json.dumps(outcomes))
cli.leave_processes()
"""


@pytest.fixture(scope='module')
def outcomes(configure: Any, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder of the run, and for each process what each of four calls of ``generate`` raised."""
    root = tmp_path_factory.mktemp('shared')
    options = {'zsq.calibration_set.source': 'procedural', 'zsq.calibration_set.num_images': 40}
    cfg = configure(root / 'out', **options)
    cfg.launcher = 'pytorch'
    (root / 'config.py').write_text(''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items()))
    (root / 'script.py').write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(PYTHONPATH=str(repo), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', MASTER_PORT=str(port))
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', WORLD_SIZE='2', **shared)
    processes = [
        subprocess.Popen(
            [sys.executable, 'script.py'],
            cwd=root,
            env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return root, [json.loads((root / f'outcomes_{rank}.json').read_text()) for rank in (0, 1)]


def test_damage_that_rank_0_finds_ends_all_processes_and_one_prints_it(outcomes: Any) -> None:
    first, second = (made[1] for made in outcomes[1])
    assert '2 files of the calibration set' in first[0] and '000003.png (changed)' in first[0]
    assert second[0] == first[0]
    assert (first[1], second[1]) == (False, True)


def test_a_full_disk_of_one_process_reaches_the_other(outcomes: Any) -> None:
    other, _ = (made[2] for made in outcomes[1])
    assert other == ['process 1 failed: OSError: [Errno 28] No space left on device', True]


def test_a_shard_that_was_damaged_before_the_merge_is_made_again(outcomes: Any) -> None:
    root, (first, second) = outcomes
    assert (first[0], second[0]) == (None, None)
    assert (first[3], second[3]) == (None, None)
    CalibrationSet.load(root / 'out' / 'calibration_set').verify()


def test_one_process_raises_its_own_error_and_returns_its_own_result() -> None:
    assert on_main(lambda: 5) == 5
    with pytest.raises(KeyError, match='x'), raise_on_all_ranks():
        raise KeyError('x')
    with pytest.raises(UserError, match='text') as caught:
        on_main(lambda: (_ for _ in ()).throw(UserError('text')))
    assert not caught.value.shown_by_peer
