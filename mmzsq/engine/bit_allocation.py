# SPDX-License-Identifier: Apache-2.0
"""Bits for each layer of a run's student, from what the teacher says of the synthetic images, before training."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from mmengine.dist import all_reduce
from torch import Tensor

from mmzsq.qat.sensitivity import measure_sensitivity
from mmzsq.quantization import QuantizationConfig
from mmzsq.quantization.allocation import Budget, size_and_operations
from mmzsq.quantization.config import Bits


def allocate_bits(runner: Any) -> None:
    """Do what ``zsq.quantizer.allocate`` says, if anything; all processes of a run come to the same bits.

    Args:
        runner: A :class:`~mmzsq.engine.ZeroShotRunner` whose calibration set is there, and whose optimizer is not yet.

    Raises:
        UserError: If no layer is free to get bits, or the budget cannot be kept.
    """
    detector = runner.detector
    config = QuantizationConfig.from_dict(detector.quantizer_cfg)
    if config.allocate is None:
        return
    budget = Budget.from_config(detector.report, config)
    budget.check()
    before = size_and_operations(detector.report, {})
    runner.logger.info(f'bits: measuring {len(budget.layers)} layers with each of {budget.candidates} bits')
    bits, _ = bits_within(runner, budget, config.allocate.batches)
    detector.assign_bits(bits)
    after = size_and_operations(detector.report, {})
    runner.logger.info(
        f'bits: allocated within {budget.limit:g} {budget.unit} ({budget.name}); model size and bit operations '
        f'{after[0]:.3f} MB, {after[1]:.3f} G, with the same bits in each layer {before[0]:.3f} MB, {before[1]:.3f} G'
    )


def bits_within(
    runner: Any, budget: Budget, batches: int, layer_done: Callable[[], None] = lambda: None
) -> tuple[dict[str, Bits], Tensor]:
    """Measure layers on the set of a run, by all of its processes, and choose their bits.

    Args:
        runner: As of :func:`allocate_bits`.
        budget: Its layers, and what they may cost.
        batches: How many of the set losses are measured on.
        layer_done: Called after each layer.

    Returns:
        Bits by the name of a layer; the sensitivity that they are chosen by, (L, C).

    Raises:
        UserError: See :func:`~mmzsq.qat.sensitivity.measure_sensitivity`.
    """
    num_init = runner.cfg.zsq.train.init_batches
    loaded = list(itertools.islice(runner.train_dataloader, max(batches, num_init)))
    sensitivity = measure_sensitivity(
        runner.detector,
        [layer.name for layer in budget.layers],
        budget.candidates,
        loaded[:batches],
        loaded[:num_init],
        inputs=budget.inputs,
        layer_done=layer_done,
    )
    # Each process has seen images of its own.
    all_reduce(sensitivity, op='mean')
    chosen = budget.allocate(sensitivity)
    return {layer.name: bits for layer, bits in zip(budget.layers, chosen, strict=True)}, sensitivity
