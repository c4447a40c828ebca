# SPDX-License-Identifier: Apache-2.0
"""A kill at any moment loses no checkpoint that was promised, and a resumed training ends with the same bits."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS

from mmzsq import atomic_files
from mmzsq.engine import ZeroShotRunner
from mmzsq.engine.random_state import random_state, set_random_state
from mmzsq.engine.safe_checkpoints import find_last_checkpoint, make_safe, write_checkpoint
from mmzsq.errors import UserError
from tests.checkpoint_digest import digest_of_tensors

NO_EVALUATION = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
ONE_BY_ONE = {**NO_EVALUATION, 'zsq.train.batch_size': 1}
"""Two epochs of three iterations."""
RANDOM_PIPELINE = [
    dict(type='LoadImageFromNDArray'),
    dict(type='PhotoMetricDistortion'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]


class Killed(BaseException):
    """Stands for a kill: no handler of errors catches it."""


class Kill(Hook):
    """Ends a run after an iteration, when all other hooks have run."""

    priority = 'LOWEST'

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        if runner.iter + 1 == self.iteration:
            raise Killed


@HOOKS.register_module(force=True)
class OwnCheckpointHook(CheckpointHook):
    """A user's own hook."""


def saving(**options: Any) -> dict[str, Any]:
    return {'default_hooks.checkpoint': dict(dict(type='CheckpointHook', interval=1, max_keep_ckpts=1), **options)}


@pytest.fixture(scope='module')
def whole(configure: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was not stopped: digests of its checkpoints by name, with all of them kept, and the folder."""
    root = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', property(lambda cfg: ''))
        options = {**ONE_BY_ONE, **saving(max_keep_ckpts=-1)}
        ZeroShotRunner.from_cfg(configure(root / 'out', **options)).train()
    return dict(root=root, last=digest_of_tensors(root / 'out' / 'epoch_2.pth'))


@pytest.fixture
def interrupted(make_config: Any, whole: Any, tmp_path: Path) -> Any:
    """Function that trains until a kill in a work_dir with a copy of the set, and returns the config to go on with."""

    def interrupt(iteration: int = 0, **options: Any) -> Config:
        shutil.copytree(whole['root'] / 'out' / 'calibration_set', tmp_path / 'out' / 'calibration_set')
        runner = ZeroShotRunner.from_cfg(make_config('out', **{**ONE_BY_ONE, **saving(), **options}))
        runner.register_hook(Kill(iteration))
        with pytest.raises(Killed):
            runner.train()
        cfg = make_config('out', **{**ONE_BY_ONE, **saving(), **options})
        cfg.zsq.teacher, cfg.resume, cfg.load_from = cfg.load_from, True, None
        return cfg

    return interrupt


def names(folder: str = 'out') -> set[str]:
    return {path.name for path in Path(folder).glob('*.pth')} | {path.name for path in Path(folder).glob('.*')}


def test_a_training_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(interrupted: Any, whole: Any) -> None:
    """MMEngine repeats the epoch, and ends at iteration 10 of 6."""
    cfg = interrupted(4, **saving(by_epoch=False))
    assert names() == {'ptq.pth', 'iter_4.pth'}
    runner = ZeroShotRunner.from_cfg(cfg)
    assert Path(runner._load_from).name == 'iter_4.pth'
    runner.train()
    assert runner.iter == 6
    ends = [torch.load(path, weights_only=True) for path in ('out/iter_6.pth', whole['root'] / 'out' / 'epoch_2.pth')]
    for part in ('state_dict', 'optimizer'):
        assert tensors(ends[0][part]) == tensors(ends[1][part])
    # The end of the last epoch, saved by iterations: no further epoch begins.
    Path('out/results.json').unlink()
    before = digest_of_tensors('out/iter_6.pth')
    runner = ZeroShotRunner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 6
    assert digest_of_tensors('out/iter_6.pth') == before


def test_checkpoints_and_epochs_do_not_split_an_update(
    interrupted: Any, make_config: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches an epoch, two an update: updates end at iterations 2, 3, 5 and 6, and so do checkpoints."""
    options = {**ONE_BY_ONE, **saving(by_epoch=False, max_keep_ckpts=-1), 'zsq.train.accumulate': 2}
    options['zsq.calibration_set.dir'] = str(whole['root'] / 'out' / 'calibration_set')
    updates: list[int] = []
    runner = ZeroShotRunner.from_cfg(make_config('all', **options))
    step = OptimWrapper.step

    def count(wrapper: OptimWrapper) -> None:
        updates.append(runner.iter + 1)
        step(wrapper)

    with monkeypatch.context() as patch:
        patch.setattr(OptimWrapper, 'step', count)
        runner.train()
    assert updates == [2, 3, 5, 6]
    assert names('all') == {'ptq.pth', *(f'iter_{update}.pth' for update in updates)}
    # Iteration 4 waits for the other batch of its update.
    cfg = interrupted(4, **options)
    assert names() == {'ptq.pth', 'iter_2.pth', 'iter_3.pth'}
    ZeroShotRunner.from_cfg(cfg).train()
    assert digest_of_tensors('out/iter_6.pth') == digest_of_tensors('all/iter_6.pth')


@pytest.mark.parametrize('iteration', [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_random_transforms_of_real_images_are_the_same_after_an_interruption(
    make_config: Any, teacher: Path, iteration: int
) -> None:
    """At the end of an epoch and in the middle, in workers that live for the whole training."""
    options = {
        **ONE_BY_ONE,
        **saving(by_epoch=False, max_keep_ckpts=-1),
        'zsq.calibration_set.real': dict(type='mmzsq.ShapesDataset', num_images=2, image_size=64),
        'zsq.train.num_workers': 1,
        'test_dataloader.dataset.pipeline': RANDOM_PIPELINE,
    }
    ZeroShotRunner.from_cfg(make_config('out', **options)).train()
    cfg = make_config(f'from_{iteration}', **options)
    cfg.zsq.teacher, cfg.resume, cfg.load_from = str(teacher), True, f'out/iter_{iteration}.pth'
    ZeroShotRunner.from_cfg(cfg).train()
    assert digest_of_tensors(f'from_{iteration}/iter_4.pth') == digest_of_tensors('out/iter_4.pth')


def test_a_training_killed_in_its_first_save_starts_again_and_ends_with_the_same_bits(
    interrupted: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 'epoch_1.pth', done=False)
        cfg = interrupted()
    assert any(name.startswith('.epoch_1.pth.') for name in names())
    runner = ZeroShotRunner.from_cfg(cfg)
    assert not runner._resume
    runner.train()
    assert digest_of_tensors('out/epoch_2.pth') == whole['last']
    assert names() == {'ptq.pth', 'epoch_2.pth'}


def test_a_training_killed_between_two_checkpoints_ends_with_the_same_bits_and_is_then_finished(
    interrupted: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written but not named yet. The hook is the user's own, and keeps one checkpoint."""
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 'epoch_1.pth', done=True)
        cfg = interrupted(**saving(type='OwnCheckpointHook'))
    assert names() == {'ptq.pth', 'epoch_1.pth'}
    assert not Path('out/last_checkpoint').exists()
    ZeroShotRunner.from_cfg(cfg).train()
    assert digest_of_tensors('out/epoch_2.pth') == whole['last']
    assert names() == {'ptq.pth', 'epoch_2.pth'}

    before = content()
    runner = ZeroShotRunner.from_cfg(cfg)
    runner.train()
    assert 'is finished: nothing is left to do' in Path(runner.log_dir, f'{runner.timestamp}.log').read_text()
    assert content() == before
    # More epochs are work.
    cfg.zsq.train.max_epochs = 3
    runner = ZeroShotRunner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 9


def tensors(value: Any, name: str = '') -> dict[str, bytes]:
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: found for index, part in parts for key, found in tensors(part, f'{name}.{index}').items()}


def content() -> dict[str, str]:
    files = [path for path in Path('out').rglob('*') if path.suffix in ('.pth', '.json', '.png')]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_at_rename(patch: pytest.MonkeyPatch, name: str, done: bool) -> None:
    """Kill the process before or after a file of that name gets its name."""
    replace = os.replace

    def kill(source: Any, target: Any) -> None:
        if Path(target).name != name:
            replace(source, target)
            return
        if done:
            replace(source, target)
        raise Killed

    patch.setattr(atomic_files.os, 'replace', kill)
    # A process that is killed does not clean up.
    patch.setattr(Path, 'unlink', lambda path, missing_ok=False: None)


def save_three(folder: Path, hook: CheckpointHook, promised: list[int]) -> None:
    """Save checkpoints of three epochs as a training does, and note each as promised once its save has returned."""
    runner: Any = SimpleNamespace(
        work_dir=str(folder), logger=logging.getLogger(), message_hub=MessageHub('three'), epoch=0, iter=0
    )

    def save(out_dir: str, name: str, *args: Any, meta: dict[str, Any], **kwargs: Any) -> None:
        notes = dict(meta, mmzsq=dict(teacher='t.pth'))
        write_checkpoint(dict(meta=notes, message_hub={}, state_dict={}), f'{out_dir}/{name}')

    runner.save_checkpoint = save
    hook.before_train(runner)
    for epoch in range(3):
        runner.epoch, runner.iter = epoch, 3 * (epoch + 1)
        hook.after_train_epoch(runner)
        promised.append(epoch + 1)


@pytest.mark.parametrize('kind', [CheckpointHook, OwnCheckpointHook])
@pytest.mark.parametrize('limit', [1, 2])
def test_a_kill_before_any_file_operation_loses_no_promised_checkpoint(
    tmp_path: Path, kind: type[CheckpointHook], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMEngine deletes the old checkpoint first, and then writes the new one and its name in place."""
    operations: list[str] = []
    kill_at = 0

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            operations.append(name)
            if len(operations) == kill_at:
                raise Killed
            # Once killed, nothing of the process runs.
            return function(*args, **kwargs) if not 0 < kill_at < len(operations) else None

        return call

    for owner, name in ((os, 'replace'), (os, 'fsync'), (Path, 'unlink')):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    lengths = []
    while True:
        folder, hook, promised = tmp_path / str(kill_at), kind(interval=1, max_keep_ckpts=limit), []
        folder.mkdir()
        make_safe(hook)
        operations.clear()
        try:
            save_three(folder, hook, promised)
        except Killed:
            pass
        lengths.append(len(promised))
        found = find_last_checkpoint([folder], print)
        if promised:
            assert found is not None
            assert int(Path(found[0]).stem.removeprefix('epoch_')) >= promised[-1]
        if not kill_at:
            total = len(operations)
            assert sorted(path.name for path in folder.glob('*.pth')) == [f'epoch_{n}.pth' for n in range(4 - limit, 4)]
        kill_at += 1
        if kill_at > total:
            break
    # Four operations to write a file and its name each, and two to delete one.
    assert total == 3 * 6 + 2 * (3 - limit)
    assert set(lengths) == {0, 1, 2, 3}


def checkpoint(path: Path, epoch: int, **changes: Any) -> None:
    content = dict(meta=dict(epoch=epoch, iter=epoch, mmzsq=dict(teacher='t.pth')), message_hub={}, state_dict={})
    torch.save({**content, **changes}, path)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A work_dir with whole checkpoints 1, 2 and 10, the PTQ baseline, a float checkpoint 11 and a damaged one, 12."""
    for epoch in (1, 10, 2):
        checkpoint(tmp_path / f'epoch_{epoch}.pth', epoch)
    checkpoint(tmp_path / 'ptq.pth', 99, meta=dict(mmzsq=dict(teacher='t.pth')))
    torch.save(dict(state_dict={}, meta=dict(epoch=11, iter=11)), tmp_path / 'epoch_11.pth')
    (tmp_path / 'epoch_12.pth').write_bytes((tmp_path / 'epoch_10.pth').read_bytes()[:300])
    return tmp_path


@pytest.mark.parametrize(
    ('pointer', 'message'),
    [
        (None, ''),
        ('', 'last_checkpoint is empty'),
        ('epoch_3.pth', 'names .*epoch_3.pth, which cannot be continued: .*does not exist'),
        ('epoch_12.pth', 'names .*epoch_12.pth, which cannot be continued: .*cannot be read'),
        ('epoch_11.pth', 'names .*epoch_11.pth, which cannot be continued: .*not the checkpoint of a quantization run'),
        ('ptq.pth', 'names .*ptq.pth, which cannot be continued: .*holds weights but no state of training'),
        (b'\xff\xfe', 'last_checkpoint cannot be read'),
    ],
)
def test_a_pointer_that_cannot_be_followed_falls_back_to_the_newest_whole_checkpoint(
    run_folder: Path, pointer: str | bytes | None, message: str
) -> None:
    if isinstance(pointer, bytes):
        (run_folder / 'last_checkpoint').write_bytes(pointer)
    elif pointer is not None:
        (run_folder / 'last_checkpoint').write_text(f'{run_folder / pointer}\n' if pointer else '')
    told: list[str] = []
    found = find_last_checkpoint([run_folder], told.append)
    assert found is not None
    assert found[0] == str(run_folder / 'epoch_10.pth')
    assert told[-1] == f'continuing from {run_folder / "epoch_10.pth"}, the newest whole checkpoint'
    text = '\n'.join(told)
    assert not message or re.search(message, text)
    # The newest ones are damaged or foreign, and each is named once.
    assert [sum(f'epoch_{epoch}.pth' in line for line in told) for epoch in (11, 12, 2, 1)] == [1, 1, 0, 0]


def test_a_pointer_to_a_whole_checkpoint_is_followed_without_a_word(run_folder: Path) -> None:
    (run_folder / 'last_checkpoint').write_text(str(run_folder / 'epoch_2.pth'))
    told: list[str] = []
    found = find_last_checkpoint([run_folder], told.append)
    assert found == (str(run_folder / 'epoch_2.pth'), dict(teacher='t.pth'))
    assert told == []


def test_without_a_whole_checkpoint_the_run_starts_from_its_teacher(make_config: Any, teacher: Path) -> None:
    Path('out').mkdir()
    Path('out/epoch_3.pth').write_bytes(b'PK damaged')
    Path('out/last_checkpoint').write_text('out/epoch_3.pth')
    cfg = make_config('out')
    cfg.resume, cfg.load_from, cfg.zsq.teacher = True, None, str(teacher)
    runner = ZeroShotRunner.from_cfg(cfg)
    assert not runner._resume
    log = Path(runner.log_dir, f'{runner.timestamp}.log').read_text()
    assert 'names out/epoch_3.pth, which cannot be continued' in log
    assert f'no run to resume in {cfg.work_dir}: starting from the teacher {teacher}' in log
    cfg.zsq.teacher = None
    with pytest.raises(UserError, match=r'epoch_3.pth.*there is no run to resume in .*set zsq.teacher'):
        ZeroShotRunner.from_cfg(cfg)


def test_ptq_weights_cannot_be_resumed(make_config: Any, run_folder: Path) -> None:
    cfg = make_config('out')
    cfg.resume, cfg.load_from = True, str(run_folder / 'ptq.pth')
    with pytest.raises(UserError, match=r'resume continues from load_from, but .*ptq.pth holds weights but no state'):
        ZeroShotRunner.from_cfg(cfg)


def test_all_generators_continue_from_a_saved_state(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))]

    # An odd number of normal variates leaves a cached one behind.
    draw()
    torch.save(random_state(), tmp_path / 'state.pth')
    expected = [draw() for _ in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert [draw() for _ in range(3)] == expected
