# SPDX-License-Identifier: Apache-2.0
"""Hook that stops a run with a non-finite loss before its checkpoint replaces a good one."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from mmzsq.errors import UserError
from mmzsq.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Checks at intervals, at the end of each epoch and before each checkpoint that the loss is finite.

    Args:
        interval: Iterations between two checks. Each check synchronizes with the device. Defaults to 50.
    """

    # Before CheckpointHook (VERY_LOW), which replaces an old checkpoint.
    priority = 'LOW'

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval
        self._due = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Check the loss of this iteration, if a check is due.

        Args:
            runner: The runner.
            batch_idx: Index of the batch in the epoch.
            data_batch: Not used.
            outputs: Logged values of the iteration. The check reads ``'loss'``, a scalar.

        Raises:
            UserError: If the loss is not finite.
        """
        intervals = [self.interval, *(hook.interval for hook in runner.hooks if _saves_between_epochs(hook))]
        due = any(self.every_n_train_iters(runner, interval) for interval in intervals)
        if outputs is None:
            return
        self._due = self._due or due or self.end_of_epoch(runner.train_dataloader, batch_idx)
        loss = outputs.get('loss')
        # Batches that wait for others of their update have no loss. The last one is checked, and then saved.
        if not self._due or loss is None:
            return
        self._due = False
        if not torch.isfinite(loss):
            raise UserError(
                f'the loss is {loss} at iteration {runner.iter}: lower zsq.train.optimizer.lr or zsq.train.step_lr, or '
                'set zsq.train.amp=False; earlier checkpoints are intact'
            )


def _saves_between_epochs(hook: Hook) -> bool:
    return isinstance(hook, CheckpointHook) and not hook.by_epoch
