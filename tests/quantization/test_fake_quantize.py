# SPDX-License-Identifier: Apache-2.0
"""Fake quantization compared with PyTorch's learnable op and a hand-worked example, and its properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmzsq.quantization import fake_quantize, quantize

RANGES = [(-2, 1), (-8, 7), (-128, 127), (0, 3), (0, 15), (0, 255)]


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def test_hand_worked_example() -> None:
    """Step 0.5, integers -2..1: two values below or above, one at each kind of rounding."""
    x, step = _leaves(torch.tensor([-9.0, -0.9, -0.3, 0.1, 0.26, 5.0]), torch.tensor([0.5]))
    y = fake_quantize(x, step, -2, 1)
    torch.testing.assert_close(y, torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]))

    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    y.backward(grad)
    # -9 and 5 are clipped. x / s inside: -1.8, -0.6, 0.2, 0.52; round(x / s) - x / s: below.
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]
    expected = 1 * -2 + 2 * -0.2 + 3 * -0.4 + 4 * -0.2 + 5 * 0.48 + 6 * 1
    assert step.grad.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(('qmin', 'qmax'), RANGES)
@pytest.mark.parametrize('scale', [1.0, 0.01])
def test_agrees_with_pytorch_per_tensor(qmin: int, qmax: int, scale: float) -> None:
    """Forward and all gradients equal PyTorch's op on values clipped to the range.

    PyTorch decides whether a value is clipped after rounding, LSQ's equations before. Clipping its
    input in a differentiable way makes the two the same function.
    """
    zero = float((qmin + qmax) // 3) if qmin == 0 else 0.0
    data = torch.randn(4, 5, 6) * (qmax - qmin) * 0.2
    x, step = _leaves(data, torch.tensor([0.37]))
    zero_point = torch.tensor([zero])
    grad = torch.randn_like(data)
    y = fake_quantize(x, step.view(1, 1, 1), qmin, qmax, zero_point.view(1, 1, 1), scale)
    y.backward(grad)

    ref_x, ref_step = _leaves(data, torch.tensor([0.37]))
    clipped = torch.maximum(ref_x, (qmin - zero) * ref_step)
    clipped = torch.minimum(clipped, (qmax - zero) * ref_step)
    expected = torch._fake_quantize_learnable_per_tensor_affine(clipped, ref_step, zero_point, qmin, qmax, 1.0)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, ref_x.grad)
    torch.testing.assert_close(step.grad, ref_step.grad * scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(('qmin', 'qmax'), RANGES)
def test_agrees_with_pytorch_away_from_the_ends(qmin: int, qmax: int) -> None:
    """Without clipping first, for values farther than half a step from the ends of the range."""
    step_value = 0.37
    data = torch.randn(2000) * (qmax - qmin) * 0.3
    level = data / step_value
    near_end = ((level - qmin).abs() < 0.51) | ((level - qmax).abs() < 0.51)
    data = data[~near_end]
    x, step = _leaves(data, torch.tensor([step_value]))
    grad = torch.randn_like(data)
    fake_quantize(x, step, qmin, qmax).backward(grad)

    ref_x, ref_step = _leaves(data, torch.tensor([step_value]))
    torch._fake_quantize_learnable_per_tensor_affine(ref_x, ref_step, torch.zeros(1), qmin, qmax, 1.0).backward(grad)
    torch.testing.assert_close(x.grad, ref_x.grad)
    torch.testing.assert_close(step.grad, ref_step.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(('qmin', 'qmax'), [(-2, 1), (-8, 7), (-127, 127)])
def test_agrees_with_pytorch_per_channel(qmin: int, qmax: int) -> None:
    """One step for each output channel."""
    data = torch.randn(5, 3, 2, 2)
    steps = torch.rand(5) / qmax + 0.01
    x, step = _leaves(data, steps)
    grad = torch.randn_like(data)
    y = fake_quantize(x, step.view(-1, 1, 1, 1), qmin, qmax)
    y.backward(grad)

    ref_x, ref_step = _leaves(data, steps)
    ends = ref_step.view(-1, 1, 1, 1)
    clipped = torch.minimum(torch.maximum(ref_x, qmin * ends), qmax * ends)
    expected = torch._fake_quantize_learnable_per_channel_affine(clipped, ref_step, torch.zeros(5), 0, qmin, qmax, 1.0)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, ref_x.grad)
    torch.testing.assert_close(step.grad, ref_step.grad, rtol=1e-4, atol=1e-4)


def test_zero_point_gradient_agrees_with_pytorch() -> None:
    """LSQ+: only clipped values move the zero point."""
    data = torch.randn(500) * 3
    grad = torch.randn(500)
    x, step, zero_point = _leaves(data, torch.tensor([0.4]), torch.tensor([5.0]))
    fake_quantize(x, step, 0, 15, zero_point, grad_scale=0.5).backward(grad)

    level = data / 0.4 + 5
    clear = (level.abs() > 0.51) & ((level - 15).abs() > 0.51)
    x, ref_step, ref_zero_point = _leaves(data[clear], torch.tensor([0.4]), torch.tensor([5.0]))
    torch._fake_quantize_learnable_per_tensor_affine(x, ref_step, ref_zero_point, 0, 15, 0.5).backward(grad[clear])
    # Values within half a step of the ends are clipped here and not in PyTorch's op.
    between = ((level < 0) & (level >= -0.51)) | ((level > 15) & (level <= 15.51))
    rest = -0.4 * 0.5 * grad[between].sum()
    torch.testing.assert_close(zero_point.grad, ref_zero_point.grad + rest)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    step=st.floats(1e-4, 1e3),
    data=st.data(),
)
def test_integers_on_the_grid_round_trip(bits: int, signed: bool, step: float, data: st.DataObject) -> None:
    """Every integer of the type, times the step, is a fixed point and comes back as itself."""
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    zero = 0 if signed else data.draw(st.integers(qmin, qmax))
    integers = torch.arange(qmin, qmax + 1)
    steps, zero_point = torch.tensor([step]), torch.tensor([float(zero)])
    x = (integers - zero) * steps
    assert torch.equal(fake_quantize(x, steps, qmin, qmax, zero_point), x)
    assert torch.equal(quantize(x, steps, qmin, qmax, zero_point), integers.int())


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    step=st.floats(0.01, 10),
    zero=st.integers(0, 15),
)
def test_properties_of_the_forward(values: list[float], step: float, zero: int) -> None:
    """Monotonic, idempotent, at most half a step off inside the range, and zero stays zero."""
    x = torch.tensor(sorted(values))
    steps, zero_point = torch.tensor([step]), torch.tensor([float(zero)])
    y = fake_quantize(x, steps, 0, 15, zero_point)
    assert (y.diff() >= 0).all()
    assert torch.equal(fake_quantize(y, steps, 0, 15, zero_point), y)
    inside = (x / steps >= -zero) & (x / steps <= 15 - zero)
    assert ((y - x).abs()[inside] <= step * 0.5001).all()
    assert not fake_quantize(torch.zeros(1), steps, 0, 15, zero_point).any()
    integers = quantize(x, steps, 0, 15, zero_point)
    assert torch.equal((integers - zero_point) * steps, y)


def test_bf16_input_is_computed_in_fp32_and_stays_bf16() -> None:
    """Output and input gradient keep the input's type; the step's gradient is summed in fp32."""
    data = torch.randn(64, 64).bfloat16()
    grad = torch.randn(64, 64).bfloat16()
    x, step = _leaves(data, torch.tensor([[0.1]]))
    y = fake_quantize(x, step, -128, 127)
    y.backward(grad)
    ref_x, ref_step = _leaves(data.float(), torch.tensor([[0.1]]))
    expected = fake_quantize(ref_x, ref_step, -128, 127)
    expected.backward(grad.float())
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert step.grad.dtype == torch.float32
    assert torch.equal(y, expected.bfloat16())
    assert torch.equal(x.grad, ref_x.grad.bfloat16())
    torch.testing.assert_close(step.grad, ref_step.grad)


def test_autocast_does_not_touch_it() -> None:
    """The same bits with and without autocast."""
    x, step = torch.randn(100), torch.tensor([0.1])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = fake_quantize(x, step, -8, 7)
    assert torch.equal(y, fake_quantize(x, step, -8, 7))


def test_memory_format_is_kept() -> None:
    """A channels_last tensor comes out as one."""
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    y = fake_quantize(x, torch.full((1, 1, 1, 1), 0.1), -8, 7)
    assert y.is_contiguous(memory_format=torch.channels_last)
