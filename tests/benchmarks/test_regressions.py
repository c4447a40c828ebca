# SPDX-License-Identifier: Apache-2.0
"""What no change may make many times slower, on any device: ratios within one process, on the smallest detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import measure, parse

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope='module')
def measured(repo: Path) -> dict[str, Any]:
    """All of the shipped detector, at 128 px."""
    config = repo / 'configs/zsq/yolov5-p_shapes_w4a4.py'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    options = ('--image-size', '128', '--batch-size', '4', '--repeats', '5', '--device', device)
    return measure(parse([str(config), *options, '--out', 'unused.json']))


def test_a_quantized_step_is_not_many_float_ones(measured: dict[str, Any]) -> None:
    # Between 1.5 and 2.5 on a CPU: unfused, each layer is quantized by a dozen operators.
    assert 0.8 < measured['training']['ratio_quantized'] < 4


def test_the_teacher_adds_a_forward_and_the_comparison(measured: dict[str, Any]) -> None:
    ratio = measured['training']['ratio_distilled'] / measured['training']['ratio_quantized']
    assert 0.3 < ratio < 3


def test_a_correction_of_the_labels_costs_no_more_than_a_few_steps(measured: dict[str, Any]) -> None:
    part = measured['relabel']
    assert part['captures_lost'] == 0
    assert part['ms_per_image_correction'] < 10 * part['ms_per_image_step']


def test_a_step_costs_the_same_with_relabeling_and_without(measured: dict[str, Any]) -> None:
    ratio = measured['relabel']['ms_per_image_step'] / measured['synthesis']['ms_per_image_iteration']
    assert 0.5 < ratio < 2
