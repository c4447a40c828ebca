# SPDX-License-Identifier: Apache-2.0
"""Weight update from several batches or processes, equal to that of one batch with all their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_world_size
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.qat.part_check import log_part_check
from mmzsq.update_parts import UpdateParts


class Part(NamedTuple):
    """One batch of an update.

    Attributes:
        inputs: Normalized and augmented images (N, 3, H, W).
        labels: What the loss takes as data samples.
    """

    inputs: Tensor
    labels: Sequence[Any] | PaddedTargets


class AccumulatedUpdate:
    """Collects the batches of an update, and runs them when the last one is there.

    The losses divide by numbers that depend on all images of the update. A first pass without gradients therefore
    records these numbers for each batch; see :class:`~mmzsq.update_parts.UpdateParts`. It runs the teacher, and the
    student only for the detection loss. Meanwhile the batches wait on the device.

    With one batch in each process, only the detection loss needs this pass. Losses of distillation average their
    divisors over processes as they compute them.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._checked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> AccumulatedUpdate:
        return type(self)()

    def __call__(
        self,
        model: Any,
        part: Part,
        optim_wrapper: OptimWrapper,
        average: Callable[[nn.Module], None] | None,
        ends: bool,
    ) -> dict[str, Tensor]:
        """Add a batch, and update the weights if it is the last one.

        Args:
            model: The :class:`~mmzsq.qat.ZeroShotDetector`.
            part: The batch.
            optim_wrapper: Optimizer wrapper of the model. Gradient clipping sees the gradient of the whole update.
            average: Averages the gradients of the model over all processes.
            ends: Whether this batch is the last one of its update, even if it is not the last of as many as
                ``optim_wrapper`` accumulates.

        Returns:
            Each loss of the images of the update, and their sum as ``'loss'``; empty if more batches are needed.
        """
        self.parts.append(part)
        done = optim_wrapper.inner_count + len(self.parts) == optim_wrapper._max_counts
        if len(self.parts) < optim_wrapper._accumulative_counts and not ends and not done:
            return {}
        parts, self.parts = self.parts, []
        update = UpdateParts(len(parts))
        # The losses of heads that take padded targets are written for parts.
        detection = bool(model.detection_weight) and not isinstance(parts[0].labels, PaddedTargets)
        in_parts = len(parts) * get_world_size() > 1
        if detection and in_parts and not self._checked:
            log_part_check(model.student, *parts[0])
            self._checked = True
        if len(parts) > 1 or (detection and in_parts):
            device = parts[0].inputs.device
            # Forked once: the losses below draw what their divisors were computed with, such as sampled regions.
            with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
                for part in parts:
                    with optim_wrapper.optim_context(model), update.recording(len(part.inputs)):
                        model.run_divisors(part.inputs, part.labels, distillation=len(parts) > 1)
        logs = []
        images = sum(len(part.inputs) for part in parts)
        for part in parts:
            model.set_update_ratio(get_world_size() * images / len(part.inputs))
            with update.replaying():
                with optim_wrapper.optim_context(model):
                    losses = model.losses(part.inputs, part.labels)
                total, log_vars = model.parse_losses(losses)
                optim_wrapper.backward(total / len(parts))
            logs.append({name: value.detach() for name, value in log_vars.items()})
        if average is not None:
            average(model)
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        return {name: torch.stack([log[name] for log in logs]).mean(0) for name in logs[0]}
