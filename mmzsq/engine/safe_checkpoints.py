# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment.

MMEngine's ``CheckpointHook`` deletes the oldest checkpoint, then writes the new one in place, and then the file that
names it. A kill in between leaves no whole checkpoint with ``max_keep_ckpts=1``. Here the new file is written beside,
synced to disk and renamed, then the file ``last_checkpoint`` names it, and only then are older ones deleted.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from mmengine.runner import save_checkpoint as save_with_mmengine

from mmzsq.atomic_files import delete, delete_unfinished, make_directory, write_atomically
from mmzsq.checkpoint import read_checkpoint
from mmzsq.engine.hooks.quantizer_init_hook import LAST_CHECKPOINT, PTQ_FILE
from mmzsq.errors import UserError

POSITION_KEY = 'position'
"""Key of a checkpoint with what :meth:`mmzsq.engine.train_loop.ResumableTrainLoop.position` returned."""


class SafeSaving(CheckpointHook):
    """Mixin of checkpoint hooks, see :func:`make_safe`."""

    _postponed = False

    def before_train(self, runner: Runner) -> None:
        """Delete what a killed process left unfinished, and prepare as the hook does.

        Args:
            runner: The runner.
        """
        super().before_train(runner)
        folder = Path(str(self.out_dir))
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            unfinished = {path.name[1:].rsplit('.', 2)[0] for path in folder.glob('.*.pth.*.tmp')}
            delete_unfinished(folder, unfinished)
            delete_unfinished(Path(runner.work_dir), {LAST_CHECKPOINT})

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save if a checkpoint by iterations is due, but never between the batches of one update.

        Args:
            runner: The runner.
            batch_idx: Index of the batch in the epoch.
            data_batch: Not used.
            outputs: Not used.
        """
        if self.by_epoch:
            return
        due = self.every_n_train_iters(runner, self.interval, self.save_begin) or (
            self.save_last and self.is_last_train_iter(runner)
        )
        if not (due or self._postponed):
            return
        self._postponed = runner.detector.update_is_open
        if not self._postponed:
            runner.logger.info(f'Saving checkpoint at {runner.iter + 1} iterations')
            self._save_checkpoint(runner)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        limit = self.max_keep_ckpts
        kept = list(self.keep_ckpt_ids) if limit > 0 else []
        if step not in kept:
            kept.append(step)
        if limit > 0:
            # All of them: if the process dies before it deletes, the resumed one does.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        surplus = kept[:-limit] if limit > 0 else []
        if limit > 0:
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept[-limit:])
        if not is_main_process():
            return
        write_atomically(Path(runner.work_dir) / LAST_CHECKPOINT, str(self.last_ckpt).encode())
        for old in surplus:
            self._delete(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _delete(self, path: str) -> None:
        if isinstance(self.file_backend, LocalBackend):
            delete(Path(path))
        elif self.file_backend.isfile(path):
            self.file_backend.remove(path)


def make_safe(hook: CheckpointHook) -> None:
    """Make a checkpoint hook write, and only then delete; a user's own subclass of MMEngine's hook too.

    Args:
        hook: The hook, changed in place.
    """
    if not isinstance(hook, SafeSaving):
        kind = type(hook)
        hook.__class__ = type(
            kind.__name__, (SafeSaving, kind), {'__module__': kind.__module__, '__doc__': kind.__doc__}
        )


def write_checkpoint(
    checkpoint: dict[str, Any], filename: str, file_client_args: Any = None, backend_args: Any = None
) -> None:
    """Save a checkpoint as ``mmengine.runner.save_checkpoint`` does, but atomically on a local disk.

    Args:
        checkpoint: The checkpoint.
        filename: Path or URI of the file.
        file_client_args: Deprecated settings of MMEngine's file client.
        backend_args: Settings of MMEngine's file backend.

    Raises:
        UserError: If a local file cannot be written. An older file of that name is then intact.
    """
    if file_client_args is not None or filename.startswith('pavi://'):
        save_with_mmengine(checkpoint, filename, file_client_args, backend_args)
        return
    backend = get_file_backend(filename, backend_args=backend_args)
    content = io.BytesIO()
    torch.save(checkpoint, content)
    if not isinstance(backend, LocalBackend):
        # Stores of objects replace an object as a whole.
        backend.put(content.getvalue(), filename)
        return
    path = Path(filename)
    make_directory(path.parent)
    write_atomically(path, content.getvalue())


def find_last_checkpoint(folders: list[Path], say: Callable[[str], None]) -> tuple[str, Mapping[str, Any]] | None:
    """Find the checkpoint to continue a run from.

    This is the one that the file ``last_checkpoint`` names. If it does not exist, is damaged or is not of a
    quantization run, the newest whole one is taken.

    Args:
        folders: The work_dir, and other folders with its checkpoints.
        say: Called with a message for each file that cannot be used, and with the one that is used instead.

    Returns:
        The path and the notes of the run, ``meta['mmzsq']``; None if there is no whole checkpoint of a run.
    """
    named = _named(folders[0], say)
    tried = set()
    if named is not None:
        tried.add(Path(named).absolute())
        try:
            return named, notes_of_run(named)
        except UserError as error:
            say(f'{folders[0] / LAST_CHECKPOINT} names {named}, which cannot be continued: {_first_line(error)}')
    for path in _newest_first(folders):
        if path.absolute() in tried or path.name == PTQ_FILE:
            continue
        try:
            notes = notes_of_run(str(path))
        except UserError as error:
            say(f'skipping {path}: {_first_line(error)}')
            continue
        say(f'continuing from {path}, the newest whole checkpoint')
        return str(path), notes
    return None


def notes_of_run(checkpoint: str) -> Mapping[str, Any]:
    """Return the notes that a run leaves in its checkpoints, ``meta['mmzsq']``.

    Args:
        checkpoint: A file, a URL or ``mmzsq://NAME``.

    Raises:
        UserError: If the checkpoint cannot be read, or does not hold the state of a training run of this project.
    """
    loaded = read_checkpoint(checkpoint)
    meta = loaded.get('meta') if isinstance(loaded, Mapping) else None
    notes = meta.get('mmzsq') if isinstance(meta, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(notes, Mapping) or 'teacher' not in notes:
        raise UserError(f'{checkpoint} is not the checkpoint of a quantization run')
    if not all(isinstance(meta.get(key), int) for key in ('epoch', 'iter')) or 'message_hub' not in loaded:
        raise UserError(f'{checkpoint} holds weights but no state of training')
    return notes


def _first_line(error: UserError) -> str:
    return str(error).splitlines()[0]


def _named(folder: Path, say: Callable[[str], None]) -> str | None:
    """Return the content of ``last_checkpoint``, or None without one."""
    pointer = folder / LAST_CHECKPOINT
    try:
        named = pointer.read_text(encoding='utf-8').strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        say(f'{pointer} cannot be read ({error})')
        return None
    if not named:
        say(f'{pointer} is empty')
        return None
    return named


def _newest_first(folders: list[Path]) -> Iterator[Path]:
    """Yield the checkpoint files: the highest number in their names first, then the latest time."""
    files = [path for folder in folders for path in folder.glob('*.pth') if path.is_file()]
    numbered = [(int((re.findall(r'\d+', path.stem) or ['-1'])[-1]), path.stat().st_mtime_ns, path) for path in files]
    yield from (path for _, _, path in sorted(numbered, reverse=True))
