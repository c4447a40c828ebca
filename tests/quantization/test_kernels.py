# SPDX-License-Identifier: Apache-2.0
"""The fused kernels compared with the plain functions, on CUDA and in Triton's interpreter on the CPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mmzsq.fused_kernels import HAS_TRITON
from mmzsq.quantization.fake_quantize import _FakeQuantize, fake_quantize

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason='no Triton')

SHAPES = {
    'vector': (5,),
    'tokens': (3, 7, 11),
    'more than a tile': (2, 3, 31, 29),
    'weight': (6, 3, 3, 3),
    'long rows': (3, 2500),
    'one value': (1, 1, 1, 1),
}
RANGES = [(-2, 1), (-7, 7), (-128, 127), (0, 15), (0, 255)]


def compare(x: Tensor, step: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> None:
    """Both functions give the same bits forward and to the input, and sums of one order or another to the grid."""
    from mmzsq.quantization.kernels import FusedFakeQuantize, can_fuse

    assert can_fuse(x, step, zero_point)
    grad = torch.randn_like(x)
    # On the grid's middle points and ends, where rounding and clipping decide.
    with torch.no_grad():
        levels = torch.arange(qmin - 1.5, qmax + 2, 0.5, device=x.device)[: x.numel()]
        x.view(-1)[: len(levels)] = (levels * step.view(-1)[0]).to(x.dtype)
    results = []
    for function in (FusedFakeQuantize, _FakeQuantize):
        leaves = [t.clone().requires_grad_() for t in (x, step) + (() if zero_point is None else (zero_point,))]
        output = function.apply(*leaves[:2], leaves[2] if len(leaves) == 3 else None, qmin, qmax, 0.25)
        output.backward(grad)
        assert output.stride() == x.stride()
        results.append((output, *(leaf.grad for leaf in leaves)))
    fused, plain = results
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1].to(x.dtype))
    for value, expected in zip(fused[2:], plain[2:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3 * qmax)


def check(device: str) -> None:
    torch.manual_seed(0)
    # The interpreter truncates to bf16 instead of rounding.
    types = (torch.float32, torch.float16) + (torch.bfloat16,) * (device == 'cuda')
    for (_, shape), (qmin, qmax), dtype in itertools.product(SHAPES.items(), RANGES, types):
        for rows, offset in ((1, False), (shape[0], False), (1, True), (shape[0], True)):
            if offset and qmin < 0:
                continue
            x = (torch.randn(shape, device=device) * (qmax - qmin) * 0.04).to(dtype)
            step = (0.05 + torch.rand((rows,) + (1,) * (len(shape) - 1), device=device)) * 0.2
            zero_point = torch.randint_like(step, qmin, qmax + 1) if offset else None
            compare(x, step, zero_point, qmin, qmax)

    from mmzsq.quantization.kernels import FusedFakeQuantize, can_fuse

    # Channels last: one step over all of it, or a row of weights each; the gradient comes in another layout.
    for rows in (1, 6):
        x = torch.randn(6, 8, 3, 5, device=device).to(memory_format=torch.channels_last)
        step = torch.rand(rows, 1, 1, 1, device=device) + 0.1
        assert can_fuse(x, step, None)
        grads = []
        for function in (FusedFakeQuantize, _FakeQuantize):
            leaves = [t.clone().requires_grad_() for t in (x, step)]
            weight = torch.arange(x.numel(), device=device).view(x.shape) / x.numel()
            (function.apply(*leaves, None, -8, 7, 1.0) * weight).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)

    # Not a number stays one, infinity is clipped.
    x = torch.tensor([float('nan'), float('inf'), -float('inf'), 0.3], device=device)
    output = FusedFakeQuantize.apply(x, torch.tensor([0.5], device=device), None, -2, 1, 1.0)
    torch.testing.assert_close(output, torch.tensor([float('nan'), 0.5, -1.0, 0.5], device=device), equal_nan=True)

    # What has gaps, nothing in it, or a step for another dimension is left to the plain function.
    wide, one = torch.randn(4, 6, device=device), torch.ones(1, 1, device=device)
    assert not can_fuse(wide[:, ::2], one, None)
    assert not can_fuse(wide[:0], one, None)
    assert not can_fuse(wide, torch.ones(1, 6, device=device), None)
    assert not can_fuse(wide.t(), torch.ones(6, 1, device=device), None)
    assert not can_fuse(wide.double(), one, None)


def test_kernels_compute_what_pytorch_does_in_the_interpreter() -> None:
    if torch.cuda.is_available():
        pytest.skip('compiled kernels are tested here')
    subprocess.run([sys.executable, __file__], env=dict(os.environ, TRITON_INTERPRET='1'), check=True, timeout=300)


@pytest.mark.cuda
def test_kernels_compute_what_pytorch_does() -> None:
    check('cuda')


@pytest.mark.cuda
def test_fake_quantize_runs_the_kernels_and_gives_equal_bits_each_time() -> None:
    x = torch.randn(16, 64, 80, 80, device='cuda', requires_grad=True)
    step = torch.full((1, 1, 1, 1), 0.1, device='cuda', requires_grad=True)
    outputs = [fake_quantize(x, step, 0, 15) for _ in range(3)]
    assert type(outputs[0].grad_fn).__name__ == 'FusedFakeQuantizeBackward'
    grads = [torch.autograd.grad(output, (x, step), torch.ones_like(output)) for output in outputs]
    for grad in grads[1:]:
        assert all(map(torch.equal, grad, grads[0]))


if __name__ == '__main__':
    check('cpu')
