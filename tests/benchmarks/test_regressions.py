# SPDX-License-Identifier: Apache-2.0
"""Ratios of step times that hold on any device, on the smallest detector in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import measure, parse

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope='module')
def measured(repo: Path) -> dict[str, Any]:
    """All measurements of the shipped detector at 128 px."""
    config = repo / 'configs/zsq/yolov5-p_shapes_w4a4.py'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    options = ('--image-size', '128', '--batch-size', '4', '--repeats', '5', '--device', device)
    return measure(parse([str(config), *options, '--out', 'unused.json']))


def test_a_quantized_step_takes_less_than_four_float_steps(measured: dict[str, Any]) -> None:
    # Between 1.5 and 2.5 on a CPU: unfused, each layer is quantized by a dozen operators.
    assert 0.8 < measured['training']['ratio_quantized'] < 4


def test_distillation_takes_less_than_three_quantized_steps(measured: dict[str, Any]) -> None:
    ratio = measured['training']['ratio_distilled'] / measured['training']['ratio_quantized']
    assert 0.3 < ratio < 3


def test_relabeling_costs_less_than_ten_steps(measured: dict[str, Any]) -> None:
    part = measured['relabel']
    assert part['captures_lost'] == 0
    assert part['ms_per_image_correction'] < 10 * part['ms_per_image_step']


def test_a_step_costs_the_same_with_relabeling_and_without(measured: dict[str, Any]) -> None:
    ratio = measured['relabel']['ms_per_image_step'] / measured['synthesis']['ms_per_image_iteration']
    assert 0.5 < ratio < 2
