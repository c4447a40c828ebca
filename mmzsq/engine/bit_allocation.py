# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision bit allocation before training, from sensitivities measured on the calibration set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, master_only
from torch import Tensor

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.engine.console import PhaseProgress
from mmzsq.qat.sensitivity import measure_sensitivity
from mmzsq.quantization.allocation import Budget, size_and_operations
from mmzsq.quantization.config import Bits
from mmzsq.report.runs import SENSITIVITY_FILE

MEASURING = dict(bits='bits: initializing each number of bits', layers='bits: measuring layers')
"""Titles of the phases of :func:`~mmzsq.qat.sensitivity.measure_sensitivity`."""


def allocate_bits(runner: Any, measured_layers: int | None = None) -> None:
    """Allocate bits to the layers of the student if ``zsq.quantizer.allocate`` is set.

    All processes of a run get the same bits.

    Args:
        runner: A :class:`~mmzsq.engine.ZeroShotRunner` with a complete calibration set and no optimizer yet.
        measured_layers: Number of layers to measure, see :func:`allocate_within_budget`.

    Raises:
        UserError: If the bits of all layers are fixed by other settings, or the budget is too small.
    """
    detector = runner.detector
    config = detector.quantization_config
    if config.allocate is None:
        return
    budget = Budget.from_config(detector.report, config)
    budget.check()
    before = size_and_operations(detector.report, {})
    count = len(budget.layers[:measured_layers])
    runner.logger.info(f'bits: measuring {count} layers with each of {budget.candidates} bits')
    with PhaseProgress(runner.logger, MEASURING, 'steps') as progress:
        bits, sensitivity = allocate_within_budget(
            runner, budget, config.allocate.batches, progress.update, measured_layers
        )
    _save_sensitivity(runner, budget, sensitivity[:measured_layers])
    detector.assign_bits(bits)
    after = size_and_operations(detector.report, {})
    runner.logger.info(
        f'bits: allocated within {budget.limit:g} {budget.unit} ({budget.name}): model size {after[0]:.3f} MB, '
        f'{after[1]:.3f} G {detector.report.bops_name}; with uniform bits {before[0]:.3f} MB, {before[1]:.3f} G'
    )


def allocate_within_budget(
    runner: Any,
    budget: Budget,
    batches: int,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    measured_layers: int | None = None,
) -> tuple[dict[str, Bits], Tensor]:
    """Measure the sensitivity of layers on the calibration set of a run, and choose their bits.

    The measurement is averaged over all processes of the run.

    Args:
        runner: The runner of :func:`allocate_bits`.
        budget: Layers, candidate bits and the limit.
        batches: Number of batches on which the losses are measured.
        on_progress: Called with the phase, and how many of its steps are done and exist, see
            :func:`~mmzsq.qat.sensitivity.measure_sensitivity`.
        measured_layers: Number of layers to measure. The others count as insensitive, and the allocation means
            nothing: this is for rehearsals. None: all.

    Returns:
        Bits by the name of a layer, and the sensitivities (L, C) of L layers with C candidates.

    Raises:
        UserError: See :func:`~mmzsq.qat.sensitivity.measure_sensitivity`.
    """
    num_init = runner.cfg.zsq.train.init_batches
    loaded = list(itertools.islice(runner.train_dataloader, max(batches, num_init)))
    sensitivity = torch.zeros(budget.costs.shape, dtype=torch.float64)
    sensitivity[:measured_layers] = measure_sensitivity(
        runner.detector,
        [layer.name for layer in budget.layers[:measured_layers]],
        budget.candidates,
        loaded[:batches],
        loaded[:num_init],
        inputs=budget.inputs,
        on_progress=on_progress,
    )
    # Each process has measured on other images.
    all_reduce(sensitivity, op='mean')
    chosen = budget.allocate(sensitivity)
    return {layer.name: bits for layer, bits in zip(budget.layers, chosen, strict=True)}, sensitivity


@master_only
def _save_sensitivity(runner: Any, budget: Budget, sensitivity: Tensor) -> None:
    """Write how much the loss grows with each number of bits of each measured layer.

    Args:
        runner: The runner, whose work_dir gets the file.
        budget: Layers and candidate bits.
        sensitivity: Growth (L, C) of the loss for the first L layers and all C candidates.
    """
    rows = {
        layer.name: {str(bits): float(f'{value:.4g}') for bits, value in zip(budget.candidates, row, strict=True)}
        for layer, row in zip(budget.layers, sensitivity.tolist(), strict=False)
    }
    write_atomically(Path(runner.work_dir) / SENSITIVITY_FILE, to_json(dict(inputs=budget.inputs, layers=rows)))
