# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, that meet a full disk or another run, end with the bits of an undisturbed run.

CI takes three points and three moments to kill a run at; ``make test-reliability`` takes twenty of each.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import Run, Server
from wrong_cases import TINY

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')

EPOCHS = 3
FINAL = f'out/epoch_{EPOCHS}.pth'
CONFIG = f"""{TINY}
val_dataloader = val_evaluator = val_cfg = None
zsq['presets']['default']['train']['max_epochs'] = {EPOCHS}
zsq['train']['num_workers'] = 1
"""
TRAIN = ('train', 'tiny.py', '--resume')

# Each run takes seconds, and tens of them more than a test may take usually.
nightly = [pytest.mark.nightly, pytest.mark.timeout(3600)]

Record = Callable[[str, object], None]


@dataclass
class Whole:
    """An undisturbed run.

    Attributes:
        folder: Its folder.
        bits: Digest of each image and label of its set, and of each tensor of its last checkpoint.
        points: Changes of files in order.
        seconds: Time until the set was complete, and until the end.
    """

    folder: Path
    bits: dict[str, str]
    points: list[str]
    seconds: tuple[float, float]


@pytest.fixture(scope='module')
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope='module')
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = new_folder(tmp_path_factory.mktemp('whole'))
    # Starts the server, whose imports are no part of the times.
    assert server.run(folder, 'generate', 'tiny.py', '--work-dir', 'warm').wait() == 0
    start = time.monotonic()
    run = server.start(folder, *TRAIN)
    assert run.wait_for('ptq.pth'), run.output
    at_set = time.monotonic() - start
    assert run.wait() == 0, run.output
    return Whole(folder, bits(folder), run.points, (at_set, time.monotonic() - start))


def new_folder(folder: Path) -> Path:
    (folder / 'tiny.py').write_text(CONFIG)
    return folder


def tensors(value: Any, name: str = '') -> Iterator[tuple[str, bytes]]:
    """Yield every tensor and number in a checkpoint with its name."""
    if isinstance(value, torch.Tensor):
        yield name, f'{value.dtype} {tuple(value.shape)} '.encode() + value.contiguous().view(-1).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f'{name}.{key}')
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from tensors(item, f'{name}.{index}')
    else:
        yield name, repr(value).encode()


def set_bits(folder: Path) -> dict[str, str]:
    """Return the digests of images and labels of the complete set."""
    root = folder / 'out/calibration_set'
    assert (root / 'manifest.json').exists()
    files = [*sorted((root / 'images').glob('*.png')), root / 'annotations/instances.json']
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits(folder: Path) -> dict[str, str]:
    """Return the digests of the set, and of weights, optimizer, schedules and averages in the last checkpoint."""
    checkpoint = torch.load(folder / FINAL, map_location='cpu', weights_only=True)
    parts = {key: checkpoint[key] for key in checkpoint if key not in ('meta', 'message_hub')}
    assert {'state_dict', 'optimizer'} <= parts.keys()
    found = {name: hashlib.sha256(content).hexdigest() for name, content in tensors(parts)}
    return {**set_bits(folder), **found}


def verdict(server: Server, folder: Path, whole: Whole) -> str:
    """Continue a run and say how it ends: ``'bit-equal'``, ``'other bits'``, or ``'lost'``."""
    run = server.run(folder, *TRAIN)
    if run.wait() != 0 or not (folder / FINAL).exists():
        return f'lost: {run.output[-500:]}'
    return 'bit-equal' if bits(folder) == whole.bits else 'other bits'


def conclude(verdicts: dict[str, str], record_property: Record) -> None:
    for kind, count in Counter(value.partition(':')[0] for value in verdicts.values()).items():
        record_property(kind, count)
    assert {name: value for name, value in verdicts.items() if value != 'bit-equal'} == {}


def kill_at(server: Server, whole: Whole, tmp_path: Path, numbers: Sequence[int]) -> dict[str, str]:
    """Kill runs at the points of these numbers, counted from one, and continue each."""
    verdicts = {}
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        run = server.run(new_folder(folder), *TRAIN, die_at=number)
        assert run.wait() == -9, run.output
        verdicts[f'{number} {run.points[-1]}'] = verdict(server, folder, whole)
        shutil.rmtree(folder)
    return verdicts


def spread(first: int, last: int, count: int) -> list[int]:
    """Return ``count`` different numbers spread over an interval."""
    return sorted({first + int((index + 0.5) * (last - first) / count) for index in range(count)})


def phases(points: list[str]) -> tuple[int, int]:
    """Return the numbers of the points where the set and training begin; training from its first checkpoint on."""
    begin = next(number for number, point in enumerate(points, 1) if 'calibration_set' in point)
    trained = next(number for number, point in enumerate(points, 1) if 'epoch_1.pth' in point)
    return begin, trained


@pytest.mark.parametrize('count', [1, pytest.param(8, marks=nightly)])
def test_a_kill_at_a_write_of_the_set_changes_nothing(
    count: int, server: Server, whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    begin, trained = phases(whole.points)
    conclude(kill_at(server, whole, tmp_path, spread(begin, trained, count)), record_property)


@pytest.mark.parametrize('count', [2, pytest.param(12, marks=nightly)])
def test_a_kill_at_a_write_of_training_changes_nothing(
    count: int, server: Server, whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    _, trained = phases(whole.points)
    conclude(kill_at(server, whole, tmp_path, spread(trained, len(whole.points) + 1, count)), record_property)


@pytest.mark.parametrize('count', [1, pytest.param(8, marks=nightly)])
def test_a_kill_at_any_moment_of_synthesis_changes_nothing(
    count: int, server: Server, whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    moments = random.Random(count)
    verdicts = {}
    for index in range(count):
        folder = tmp_path / str(index)
        folder.mkdir()
        run = server.start(new_folder(folder), *TRAIN)
        seconds = moments.uniform(0, whole.seconds[0])
        time.sleep(seconds)
        run.kill()
        verdicts[f'run {index}, {seconds:.2f} s'] = verdict(server, folder, whole)
    conclude(verdicts, record_property)


@pytest.mark.parametrize('count', [2, pytest.param(12, marks=nightly)])
def test_a_kill_at_any_moment_of_training_changes_nothing(
    count: int, server: Server, whole: Whole, tmp_path: Path, record_property: Record
) -> None:
    moments = random.Random(count)
    set_there, end = whole.seconds
    verdicts = {}
    for index in range(count):
        folder = tmp_path / str(index)
        folder.mkdir()
        run = server.start(new_folder(folder), *TRAIN)
        # Sometimes while the second checkpoint is written.
        run.wait_for(r'(open|write) out/(\S*scalars.json|\.?epoch_2)')
        seconds = moments.uniform(0, 0.3 * (end - set_there))
        time.sleep(seconds)
        run.kill()
        verdicts[f'run {index}, {seconds:.2f} s'] = verdict(server, folder, whole)
    conclude(verdicts, record_property)


QUANTIZE = (
    *('--bits', 'w4a8', '--work-dir', 'out', '--target', 'onnxruntime', '--size', '128', '128', '--cfg-options'),
    *('zsq.calibration_set.source=procedural', 'zsq.calibration_set.num_images=4', 'zsq.train.max_epochs=2'),
    *('zsq.train.init_batches=1', 'zsq.train.batch_size=2', 'zsq.train.num_workers=0'),
)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_killed_quantization_ends_with_the_same_file(
    server: Server, shared: Path, tmp_path: Path, record_property: Record
) -> None:
    pytest.importorskip('onnxruntime')
    command = ('quantize', str(shared / 'weights/yolov5n.pt'), *QUANTIZE)

    def exported(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / 'out').glob('*.onnx')}

    folder = tmp_path / 'whole'
    folder.mkdir()
    run = server.run(folder, *command)
    assert run.wait() == 0, run.output
    expected, count = exported(folder), len(run.points)
    assert 'yolov5n_w4a8.onnx' in expected
    verdicts = {}
    # Progress is logged by the clock, so that another run may pass fewer points.
    for number in spread(1, int(0.9 * count), 8):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = server.run(folder, *command, die_at=number)
        assert run.wait() == -9, run.output
        name = f'{number} {run.points[-1]}'
        run = server.run(folder, *command)
        if run.wait() != 0:
            verdicts[name] = f'lost: {run.output[-500:]}'
        else:
            verdicts[name] = 'bit-equal' if exported(folder) == expected else 'other bits'
        shutil.rmtree(folder)
    conclude(verdicts, record_property)


# Disk full.


def check_message(run: Run, path: str) -> None:
    """Check that a run ended with one message that names a path."""
    assert run.wait() == 2, run.output
    assert 'Traceback' not in run.output
    [message] = [line for line in run.output.splitlines() if line.startswith('error: ')]
    assert path in message
    assert re.search('File too large|No space left', message)


def size_of(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize(
    ('smaller', 'larger', 'named'),
    [
        ('out/ptq.pth', 'out/epoch_1.pth', 'epoch_1.pth'),
        ('out/calibration_set/previews/*.png', 'out/ptq.pth', 'ptq.pth'),
    ],
)
def test_a_full_disk_is_one_message_and_what_was_written_is_used(
    smaller: str, larger: str, named: str, server: Server, whole: Whole, tmp_path: Path
) -> None:
    kept = max(map(size_of, whole.folder.glob(smaller)))
    full = size_of(next(whole.folder.glob(larger.replace('epoch_1', f'epoch_{EPOCHS}'))))
    run = server.run(new_folder(tmp_path), *TRAIN, max_bytes=(kept + full) // 2)
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out/calibration_set/images').iterdir()}
    assert images
    check_message(run, named)
    assert verdict(server, tmp_path, whole) == 'bit-equal'
    assert {path: path.stat().st_mtime_ns for path in images} == images


# Files that are there or missing.


@pytest.fixture
def unfinished(whole: Whole, tmp_path: Path) -> Path:
    """A copy of the undisturbed run before training, whose set lacks the second shard."""
    shutil.copytree(whole.folder / 'out/calibration_set', tmp_path / 'out/calibration_set')
    for name in ('manifest.json', 'shards/00001.json', 'images/000002.png'):
        (tmp_path / 'out/calibration_set' / name).unlink()
    return new_folder(tmp_path)


@pytest.mark.parametrize(
    'names',
    [
        (
            'images/.000002.png.0123456789abcdef.tmp',
            'shards/.00001.json.0123456789abcdef.tmp',
            '.manifest.json.0123456789abcdef.tmp',
            'previews/shard_00001_relabel.part.png',
        ),
        ('images/.odd.tmp',),
    ],
)
def test_stale_temporary_files_change_nothing(
    names: tuple[str, ...], server: Server, whole: Whole, unfinished: Path
) -> None:
    root = unfinished / 'out/calibration_set'
    for name in names:
        (root / name).write_bytes(b'half of a fi')
    for name in ('.ptq.pth', '.epoch_1.pth', '.last_checkpoint', '.results.json'):
        (unfinished / f'out/{name}.0123456789abcdef.tmp').write_bytes(b'half of a fi')
    run = server.run(unfinished, 'generate', 'tiny.py')
    assert run.wait() == 0, run.output
    expected = {name: digest for name, digest in whole.bits.items() if name in set_bits(unfinished)}
    assert set_bits(unfinished) == expected
    if '.odd' not in names[0]:
        assert not list(root.rglob('.*.tmp'))


@pytest.mark.parametrize(
    'deleted',
    [
        ('shards/00000.json',),
        ('images/000001.png', 'manifest.json'),
        ('shards/00001.json', 'images/000002.png'),
    ],
)
def test_what_is_deleted_of_a_set_is_made_again(
    deleted: tuple[str, ...], server: Server, whole: Whole, tmp_path: Path
) -> None:
    root = tmp_path / 'out/calibration_set'
    shutil.copytree(whole.folder / 'out/calibration_set', root)
    for name in deleted:
        (root / name).unlink()
    kept = root / 'images/000000.png'
    written = kept.stat().st_mtime_ns
    run = server.run(new_folder(tmp_path), 'generate', 'tiny.py')
    assert run.wait() == 0, run.output
    assert set_bits(tmp_path).items() <= whole.bits.items()
    if deleted[0] == 'shards/00001.json':
        assert kept.stat().st_mtime_ns == written


# Several processes.


@pytest.fixture(scope='module')
def two_writers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """Folder and processes of two writers of one set, which were started together and have ended."""
    folder = new_folder(tmp_path_factory.mktemp('writers'))
    runs = [server.start(folder, 'generate', 'tiny.py') for _ in range(2)]
    for run in runs:
        run.wait()
    return folder, runs


def test_two_writers_of_one_set_make_one_set(two_writers: tuple[Path, list[Run]], whole: Whole) -> None:
    folder, runs = two_writers
    for run in runs:
        # The second may also refuse.
        assert run.wait() in (0, 2), run.output
        assert 'Traceback' not in run.output
    assert 0 in [run.wait() for run in runs]
    assert set_bits(folder).items() <= whole.bits.items()


def test_a_second_writer_says_that_there_is_another(two_writers: tuple[Path, list[Run]]) -> None:
    assert any(re.search('another|other process', run.output) for run in two_writers[1])


@dataclass
class Widowed:
    """The process of rank 0 after rank 1 was killed.

    Attributes:
        run: Its run.
        code: Exit code; None if it had not ended in time.
    """

    run: Run
    code: int | None


@pytest.fixture(scope='module', params=['synthesis', 'training'])
def widowed(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Widowed:
    folder = new_folder(tmp_path_factory.mktemp(request.param))
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        port = str(listening.getsockname()[1])
    command = ('train', 'tiny.py', '--launcher', 'pytorch', '--cfg-options', 'zsq.train.max_epochs=500')
    common = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE='2')
    runs = [
        server.start(
            folder,
            *command,
            environment=dict(common, RANK=str(rank), LOCAL_RANK=str(rank)),
            **(dict(die_on='write .*images/') if rank and request.param == 'synthesis' else {}),
        )
        for rank in range(2)
    ]
    if request.param == 'training':
        assert runs[0].wait_for('epoch_1.pth'), runs[0].output
        runs[1].kill()
    assert runs[1].wait() == -9, runs[1].output
    code = runs[0].wait(60)
    runs[0].kill()
    return Widowed(runs[0], code)


def test_a_rank_whose_peer_dies_ends_in_bounded_time(widowed: Widowed) -> None:
    assert widowed.code not in (None, 0), widowed.run.output


def test_a_rank_whose_peer_dies_says_so(widowed: Widowed) -> None:
    assert 'Traceback' not in widowed.run.output
    assert len([line for line in widowed.run.output.splitlines() if line.startswith('error: ')]) == 1
