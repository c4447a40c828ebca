# SPDX-License-Identifier: Apache-2.0
"""Tests of deployment need the runtimes of the extra ``deploy``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ('onnx', 'onnxruntime', 'openvino'):
    pytest.importorskip(package, exc_type=ImportError)

from quantized_detectors import shipped_detector  # noqa: E402
from quantized_networks import lowered, outputs  # noqa: E402


@pytest.fixture
def assert_same() -> Callable[..., Any]:
    """Export a network for a target and compare both engines with PyTorch."""

    def check(model: nn.Module, x: Tensor, target: str = 'openvino', **options: Any) -> Any:
        built = lowered(model, x, target, **options)
        with torch.no_grad():
            expected = model(x)
        expected = expected if isinstance(expected, (tuple, list)) else (expected,)
        # OpenVINO is wrong for signed activations behind a Concat; files for TensorRT are not for it.
        for runtime in ('onnxruntime',) if target == 'tensorrt' else ('onnxruntime', 'openvino'):
            for value, given in zip(expected, outputs(built, x, runtime), strict=True):
                torch.testing.assert_close(given, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
        return built

    return check


@pytest.fixture(scope='session')
def demo(repo: Path) -> tuple[Any, Any, torch.Tensor]:
    """The shipped detector with 4 bits and input factors, its config, and a batch."""
    return shipped_detector(repo, 4, equalize=True)


@pytest.fixture(scope='session')
def demo_8_bits(repo: Path) -> tuple[Any, Any, torch.Tensor]:
    """The shipped detector with 8 bits."""
    return shipped_detector(repo, 8)
