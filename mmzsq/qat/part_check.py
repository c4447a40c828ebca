# SPDX-License-Identifier: Apache-2.0
"""Check that a detector's own loss of an update in parts is that of one batch.

:mod:`~mmzsq.tasks.loss_divisors` finds the divisors of most losses. A loss may still hide one, or depend on all images
of a batch in another way. Two images, as one batch and as two parts, show the difference before training.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.models.task_modules.samplers import BaseSampler
from mmengine.logging import print_log
from torch import Tensor, nn

from mmzsq.models.train_eval_modes import eval_mode, frozen_train_mode, kept_buffers, single_process
from mmzsq.patching import patched
from mmzsq.tasks.detection_task import add_ignored_semantic_labels, sum_losses
from mmzsq.tasks.training_losses import detection_losses
from mmzsq.update_parts import UpdateParts

TOLERANCE = 0.02
"""Relative difference of a loss that rounding may cause: a quantized value close to a limit takes another level."""

TAKE_ALL = dict(num=10**6, pos_fraction=0.5, neg_pos_ub=-1)
"""Attributes of samplers."""


def log_part_check(detector: nn.Module, inputs: Tensor, data_samples: Sequence[Any]) -> None:
    """Log whether an update in parts equals one batch; a warning names the losses that differ, or why none is known.

    Args:
        detector: The student.
        inputs: Normalized images (N, 3, H, W). Two of them are used.
        data_samples: Their labels.
    """
    chosen = _two_images(data_samples)
    if chosen is None:
        print_log('update in parts: not compared with one batch, which takes two images with objects', logger='current')
        return
    try:
        differences, changing = part_differences(detector, inputs[chosen], [data_samples[index] for index in chosen])
    except Exception as error:
        # Training does not need the check, and may never see a batch of one image.
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        print_log(f'update in parts: not compared with one batch ({reason})', logger='current', level=logging.WARNING)
        return
    wrong = {name: value for name, value in differences.items() if value > TOLERANCE and name not in changing}
    if changing:
        names = ', '.join(sorted(changing))
        print_log(f'update in parts: random losses are not compared with one batch: {names}', logger='current')
    if wrong:
        print_log(
            'update in parts: its gradient is not that of one batch with all images, because the divisor of '
            f'{", ".join(f"{name} (differs by {value:.0%})" for name, value in sorted(wrong.items()))} is not known. '
            'Each part divides by its own. For the gradient of one batch, set zsq.train.accumulate=1 and train in one '
            'process, or set zsq.distillation.detection_weight=0.',
            logger='current',
            level=logging.WARNING,
        )
    else:
        names = ', '.join(sorted(differences.keys() - changing)) or 'none'
        print_log(f'update in parts: these detection losses are those of one batch: {names}', logger='current')


def part_differences(
    detector: nn.Module, inputs: Tensor, data_samples: Sequence[Any]
) -> tuple[dict[str, float], set[str]]:
    """Compare the detector's losses of two images as one batch and as two parts of an update.

    Samplers take all regions. Neither weights, statistics, labels nor random generators change.

    Args:
        detector: Any detector.
        inputs: Normalized images (2, 3, H, W).
        data_samples: Their labels. One of the images gets fewer objects than the other, if one has several.

    Returns:
        The relative difference of each loss, and the names of losses that are not the same for the same images twice.
    """
    samples = copy.deepcopy(list(data_samples))
    if len(samples[0].gt_instances) == len(samples[1].gt_instances):
        samples[0].gt_instances = samples[0].gt_instances[:1]
    update = UpdateParts(2)

    def run(images: slice) -> dict[str, float]:
        labels = copy.deepcopy(samples[images])
        add_ignored_semantic_labels(detector, labels)
        return _values(detection_losses(detector, inputs[images], labels))

    with _kept_random_state(inputs.device), single_process(), kept_buffers(detector), eval_mode(detector, keep=()):
        with frozen_train_mode(detector), _taking_all(detector), torch.no_grad():
            whole, again = run(slice(2)), run(slice(2))
            for image in range(2):
                with update.recording(images=1):
                    run(slice(image, image + 1))
            parts = []
            for image in range(2):
                # Divisors are found where there is a gradient.
                with update.replaying(), torch.enable_grad():
                    parts.append(run(slice(image, image + 1)))
    names = sorted({name for losses in (whole, *parts) for name in losses})
    means = {name: sum(losses.get(name, 0.0) for losses in parts) / 2 for name in names}
    changing = {name for name in names if _difference(whole.get(name, 0.0), again.get(name, 0.0)) > TOLERANCE}
    return {name: _difference(whole.get(name, 0.0), means[name]) for name in names}, changing


def _two_images(data_samples: Sequence[Any]) -> list[int] | None:
    """Return the indices of the images with the fewest objects, but at least one, and with the most."""
    counts = [len(sample.gt_instances) for sample in data_samples]
    order = sorted((index for index, count in enumerate(counts) if count), key=lambda index: counts[index])
    return [order[0], order[-1]] if len(order) > 1 else None


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore all random generators at the end of the block: samplers of MMDetection also draw from NumPy's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _taking_all(detector: nn.Module) -> Iterator[None]:
    """Let samplers of the detector's heads take all regions inside the block."""
    with ExitStack() as stack:
        for module in detector.modules():
            for value in vars(module).values():
                for sampler in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(sampler, BaseSampler):
                        for name, setting in TAKE_ALL.items():
                            stack.enter_context(patched(sampler, name, setting))
        yield


def _values(losses: dict[str, Any]) -> dict[str, float]:
    return {name: float(sum_losses({name: value}).detach()) for name, value in losses.items() if 'loss' in name}


def _difference(first: float, second: float) -> float:
    return abs(first - second) / max(abs(first), abs(second), 1e-6)
