# SPDX-License-Identifier: Apache-2.0
"""Bits for each layer of a run's student, from what the teacher says of the synthetic images, before training."""

from __future__ import annotations

import itertools
from typing import Any

from mmengine.dist import all_reduce

from mmzsq.detectors.sensitivity import measure_sensitivity
from mmzsq.quantization import QuantizationConfig
from mmzsq.quantization.allocation import Budget, overrides_of, totals


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
    budget = Budget.of_config(detector.report, config)
    budget.check()
    before = totals(detector.report, {})
    init_batches = runner.cfg.zsq.train.init_batches
    batches = list(itertools.islice(runner.train_dataloader, max(config.allocate.batches, init_batches)))
    runner.logger.info(f'bits: measuring {len(budget.layers)} layers with each of {budget.candidates} bits')
    sensitivity = measure_sensitivity(
        detector,
        [layer.name for layer in budget.layers],
        budget.candidates,
        batches[: config.allocate.batches],
        batches[:init_batches],
        inputs=budget.inputs,
    )
    # Each process has seen images of its own.
    all_reduce(sensitivity, op='mean')
    bits = {layer.name: of for layer, of in zip(budget.layers, budget.allocate(sensitivity), strict=True)}
    detector.assign_bits(overrides_of(detector.report, bits))
    after = totals(detector.report, {})
    runner.logger.info(
        f'bits: allocated within {budget.limit:g} {budget.unit} ({budget.name}); model size and bit operations '
        f'{after[0]:.3f} MB, {after[1]:.3f} G, with the same bits in each layer {before[0]:.3f} MB, {before[1]:.3f} G'
    )
