# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose loss is no longer a number, before its checkpoint replaces a good one."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from mmzsq.errors import UserError
from mmzsq.registry import HOOKS


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Looks at the loss from time to time and before each checkpoint.

    Args:
        interval: Iterations between two looks; each waits for the device once.
    """

    # Before CheckpointHook (VERY_LOW), which deletes what it replaces and only then saves.
    priority = 'LOW'

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Check the loss of this iteration."""
        intervals = [self.interval, *(hook.interval for hook in runner.hooks if _saves_between_epochs(hook))]
        due = any(self.every_n_train_iters(runner, interval) for interval in intervals)
        if not (due or self.end_of_epoch(runner.train_dataloader, batch_idx)):
            return
        loss = (outputs or {}).get('loss')
        if loss is not None and not torch.isfinite(loss):
            raise UserError(
                f'the loss is {loss} at iteration {runner.iter}: lower zsq.train.optimizer.lr or zsq.train.step_lr, or '
                'set zsq.train.amp=False; the checkpoints written before are intact'
            )


def _saves_between_epochs(hook: Hook) -> bool:
    return isinstance(hook, CheckpointHook) and not hook.by_epoch
