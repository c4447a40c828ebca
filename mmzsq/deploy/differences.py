# SPDX-License-Identifier: Apache-2.0
"""Differences between the values of PyTorch and those of a file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EXACT = 1e-6
"""Largest difference of a step or a bias, relative to the largest: both are computed in float64 and stored in float32.
"""


def relative_difference(expected: np.ndarray, given: np.ndarray, least: float = 0.0) -> float:
    """Return the largest difference relative to the largest expected value, or to ``least`` if that is larger.

    It is infinite for unlike shapes, and where only one of both is infinite or NaN. Boxes of untrained detectors may
    be infinite in both.
    """
    if expected.shape != given.shape:
        return float('inf')
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], given[~finite], equal_nan=True) or not np.isfinite(given[finite]).all():
        return float('inf')
    expected, given = expected[finite], given[finite]
    largest = max(float(np.abs(expected).max(initial=0.0)), least)
    difference = float(np.abs(expected - given).max(initial=0.0))
    return difference / largest if largest else difference


def mean_difference(expected: Tensor, given: Tensor) -> float:
    """Return the mean difference relative to the mean of the expected values, infinite as the largest difference is.

    Values that are infinite or NaN in both are left out.
    """
    expected, given = expected.double().cpu(), given.double().cpu()
    if expected.shape != given.shape:
        return float('inf')
    finite = expected.isfinite()
    if not torch.equal(finite, given.isfinite()):
        return float('inf')
    expected, given = expected[finite], given[finite]
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().mean())
    difference = float((expected - given).abs().mean())
    return difference / scale if scale else difference


def equal_in_float32(expected: np.ndarray, given: np.ndarray) -> bool:
    """Whether values are equal up to the rounding of float32; one value may stand for all."""
    expected, given = np.asarray(expected, np.float64).reshape(-1), np.asarray(given, np.float64).reshape(-1)
    if expected.size != given.size and 1 not in (expected.size, given.size):
        return False
    return bool((np.abs(expected - given) <= EXACT * np.abs(expected).max(initial=0.0)).all())
