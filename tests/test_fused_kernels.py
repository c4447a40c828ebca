# SPDX-License-Identifier: Apache-2.0
"""The switch between kernels written by hand and PyTorch's operators."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmzsq.fused_kernels import VARIABLE, fused_kernels_enabled
from mmzsq.quantization import fake_quantize
from mmzsq.synthesis.priors import total_variation


@pytest.mark.parametrize(('value', 'allowed'), [(None, True), ('1', True), ('0', False)])
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, value: str | None, allowed: bool) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert fused_kernels_enabled() == allowed


@pytest.mark.parametrize('allowed', [True, False])
def test_fake_quantization_on_a_gpu_is_fused_if_allowed(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    pytest.importorskip('triton')
    from mmzsq.quantization import kernels

    module: Any = sys.modules[fake_quantize.__module__]
    monkeypatch.setenv(VARIABLE, str(int(allowed)))
    monkeypatch.setattr(kernels, 'can_fuse', lambda *_: True)
    chosen = module._function_for(SimpleNamespace(is_cuda=True), None, None)
    assert (chosen is kernels.FusedFakeQuantize) == allowed


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_the_general_path_launches_no_kernel_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 32, 32, device='cuda')
    step = torch.full((1, 1, 1, 1), 0.1, device='cuda')
    seen, results = {}, {}
    for value in ('1', '0'):
        monkeypatch.setenv(VARIABLE, value)
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                results[value] = torch.stack((fake_quantize(x, step, -8, 7).square().sum(), total_variation(x)))
                torch.cuda.synchronize()
        seen[value] = {event.key for event in profile.key_averages()}
    torch.testing.assert_close(results['0'], results['1'])
    ours = {'_forward', '_total_variation_forward'}
    assert ours <= seen['1']
    assert not ours & seen['0']
