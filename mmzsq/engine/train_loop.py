# SPDX-License-Identifier: Apache-2.0
"""Training loop that continues from a checkpoint as if it had not been interrupted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmzsq.engine.backends import Backends
from mmzsq.engine.console import ConsoleProgress
from mmzsq.engine.random_state import random_state, set_random_state
from mmzsq.registry import LOOPS
from mmzsq.visualization import draw_steps

SHOWN_STEPS = 4
"""Histograms of the steps that visualizer backends get, evenly spaced over the training."""


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """MMEngine's training by epochs, which a checkpoint between any two iterations continues bit by bit.

    MMEngine's own loop repeats the epoch of a checkpoint that was saved by iterations, and draws other random numbers
    than before. Here the checkpoint holds :meth:`position`: the batches that are done, and the random state of each
    process. Batches of the epoch that are done are read again and skipped, so that random transforms draw the same
    numbers too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch = 0
        self._epoch_start: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None

    def run(self) -> Any:
        """Train, and show the progress: the losses are read only when they are shown."""
        self._backends = Backends(self.runner)
        with ConsoleProgress(
            self.runner.logger, 'training', self._max_iters, 'iterations', start=self._iter
        ) as self._progress:
            model = super().run()
        end_workers(self.dataloader)
        return model

    def _state(self) -> str:
        """Return the epoch and the latest losses."""
        latest = {
            name.removeprefix('train/'): buffer.current()
            for name, buffer in self.runner.message_hub.log_scalars.items()
            if name.startswith('train/') and 'loss' in name
        }
        losses = (f'{name}={value:.4g}' for name, value in latest.items())
        return ' '.join((f'epoch {self._epoch + 1}/{self._max_epochs}', *losses))

    def position(self) -> dict[str, Any]:
        """Return the position between two iterations. All processes must call this together.

        Returns:
            ``epoch`` and the number of its batches that are done, ``batch``; ``batches``, the length of an epoch; and
            for each process, in ``processes``, the random state now and at the start of the epoch.
        """
        own = dict(now=random_state(), epoch_start=self._epoch_start)
        return dict(
            epoch=self._epoch, batch=self._batch, batches=len(self.dataloader), processes=all_gather_object(own)
        )

    def resume(self, position: Mapping[str, Any] | None) -> None:
        """Continue from a position.

        Args:
            position: A :meth:`position`, or None if the checkpoint has none. It is ignored with a warning if epochs
                have another length now.
        """
        if position is None:
            print_log(
                'the checkpoint holds no random state: the result will differ from that of a run without interruption',
                logger='current',
                level=logging.WARNING,
            )
            return
        if position['batches'] != len(self.dataloader) or len(position['processes']) != get_world_size():
            print_log(
                f'the checkpoint is of {len(position["processes"])} processes with {position["batches"]} batches per '
                f'epoch, and this run has {get_world_size()} with {len(self.dataloader)}: training continues, but the '
                'result will differ from that of a run without interruption',
                logger='current',
                level=logging.WARNING,
            )
            return
        done_epochs, skipped = divmod(position['batch'], position['batches'])
        self._epoch = position['epoch'] + done_epochs
        self._resumed = dict(position['processes'][get_rank()], skipped=skipped)

    def run_epoch(self) -> None:
        """Train for one epoch, or for what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        resumed, self._resumed = self._resumed, None
        skipped = resumed['skipped'] if resumed else 0
        if resumed:
            # What the data loader draws at the start of an epoch seeds its workers.
            set_random_state(resumed['epoch_start'] if skipped else resumed['now'])
        self._epoch_start = random_state()
        batches = iter(self.dataloader)
        for _ in range(skipped):
            next(batches)
        # A data loader draws when it creates its workers. Persistent ones were there when this epoch began first.
        if resumed and (skipped or self.dataloader.persistent_workers):
            set_random_state(resumed['now'])
        for index, batch in enumerate(batches, skipped):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        if self._epoch % max(self._max_epochs // SHOWN_STEPS, 1) == 0:
            self._backends.add_image('steps', lambda: draw_steps(self.runner.detector.student), self._iter)

    def run_iter(self, idx: int, data_batch: Sequence[dict[str, Any]]) -> None:
        """Train on one batch.

        Args:
            idx: Index of the batch in the epoch.
            data_batch: The batch.
        """
        self._batch = idx + 1
        # As with one large batch, no update mixes two epochs, and a checkpoint of an epoch splits none.
        self.runner.detector.update_ends = self._batch == len(self.dataloader)
        super().run_iter(idx, data_batch)
        self._progress.update(self._iter, self._state)


def end_workers(loader: DataLoader[Any]) -> None:
    """End the persistent worker processes of a data loader. It starts new ones when it is iterated again.

    Otherwise they live as long as the loader. After a run on a GPU with two of them, the process took 19 s to end, and
    2 s without workers.
    """
    # PyTorch keeps persistent workers here and has no public way to end them.
    iterator: Any = getattr(loader, '_iterator', None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None
