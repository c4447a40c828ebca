# SPDX-License-Identifier: Apache-2.0
"""Quantizers: learned parameters, state dict, initialization and errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.quantization import LSQ, LSQPlus, fake_quantize
from mmzsq.quantization.statistics import ActivationStatistics
from mmzsq.quantization.step_search import Grid


def _ready(quantizer: LSQ, step: float, zero_point: float = 0.0) -> LSQ:
    shape = (quantizer.num_steps,)
    quantizer.set_grid(Grid(torch.full(shape, step), torch.full(shape, zero_point)))
    return quantizer


def _seen(x: Tensor) -> ActivationStatistics:
    statistics = ActivationStatistics(torch.device('cpu'))
    statistics.update(x)
    return statistics


@pytest.mark.parametrize(
    ('kwargs', 'qmin', 'qmax'),
    [
        (dict(bits=2, scheme='signed'), -2, 1),
        (dict(bits=4, scheme='signed', narrow=True), -7, 7),
        (dict(bits=5, scheme='unsigned'), 0, 31),
        (dict(bits=8, scheme='offset'), 0, 255),
    ],
)
def test_integer_ranges(kwargs: dict[str, Any], qmin: int, qmax: int) -> None:
    """Signed, symmetric, unsigned and offset integers."""
    quantizer = LSQ(**kwargs)
    assert (quantizer.qmin, quantizer.qmax) == (qmin, qmax)
    integers = _ready(quantizer, 0.1).quantize(torch.linspace(-99, 99, 5000))
    assert (int(integers.min()), int(integers.max())) == (qmin, qmax)


@pytest.mark.parametrize('step', ['log', 'linear'])
def test_gradient_of_the_learned_parameter(step: str) -> None:
    """The chain rule to log s is s * ds; linear steps get ds itself; both scaled by LSQ's rule."""
    x, grad = torch.randn(6, 50), torch.randn(6, 50)
    quantizer = _ready(LSQ(bits=4, num_steps=6, step=step), 0.2)
    quantizer(x).backward(grad)
    (learned,) = quantizer.parameters()

    reference = torch.full((6, 1), 0.2, requires_grad=True)
    fake_quantize(x, reference, -8, 7).backward(grad)
    # 50 values share each step: numel / C.
    expected = reference.grad.flatten() / (50 * 7) ** 0.5 * (0.2 if step == 'log' else 1.0)
    torch.testing.assert_close(learned.grad, expected)


def test_gradient_scale_can_be_left_out() -> None:
    """grad_scale=False gives the bare gradient."""
    x = torch.randn(40)
    scaled, bare = (_ready(LSQ(bits=3, grad_scale=flag), 0.3) for flag in (True, False))
    for quantizer in (scaled, bare):
        quantizer(x).sum().backward()
    ratio = bare.log_step.grad / scaled.log_step.grad
    torch.testing.assert_close(ratio, torch.tensor([(40 * 3) ** 0.5]))


def test_a_linear_step_stays_positive_and_comes_back() -> None:
    """An optimizer that steps over zero neither breaks the forward nor ends the learning."""
    quantizer = _ready(LSQ(bits=4, step='linear'), 0.1)
    with torch.no_grad():
        quantizer.linear_step.fill_(-0.05)
    y = quantizer(torch.randn(100))
    assert float(quantizer.step.detach()) > 0
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert float(quantizer.linear_step.grad) != 0


def test_first_step_of_the_paper() -> None:
    """2 * mean|x| / sqrt(qmax), of all values for activations and of each channel for weights."""
    weight = torch.randn(3, 4, 2, 2)
    grid = LSQ(bits=4, num_steps=3, init='lsq').initial_weight_grid(weight)
    torch.testing.assert_close(grid.step, 2 * weight.abs().mean((1, 2, 3)) / 7**0.5)
    x = torch.randn(1000)
    grid = LSQ(bits=4, init='lsq').initial_activation_grid(_seen(x))
    torch.testing.assert_close(grid.step, 2 * x.abs().mean()[None] / 7**0.5)


def test_first_zero_point_of_the_paper_rule_covers_the_negatives() -> None:
    """With init='lsq' and an offset, the lowest integer represents the least value."""
    x = torch.rand(1000) - 0.25
    grid = LSQ(bits=4, scheme='offset', init='lsq').initial_activation_grid(_seen(x))
    assert float(grid.zero_point) == round(float(-x.min() / grid.step))


@pytest.mark.parametrize(('values', 'expected'), [([100.0, 101.0], 0.0), ([-100.0, *[0.1] * 999], 15.0)])
def test_first_zero_point_of_the_paper_rule_stays_in_the_integer_range(values: list[float], expected: float) -> None:
    """All values far above zero, or a single one far below it."""
    quantizer = LSQ(bits=4, scheme='offset', init='lsq')
    grid = quantizer.initial_activation_grid(_seen(torch.tensor(values)))
    unclamped = round(float(-min(values) / grid.step))
    assert not quantizer.qmin <= unclamped <= quantizer.qmax
    assert grid.zero_point.tolist() == [expected]


def test_mse_beats_the_papers_rule_at_eight_bits() -> None:
    """On activations after SiLU: a step that grows with mean|x| / sqrt(qmax) is far too wide."""
    x = torch.nn.functional.silu(torch.randn(5000))
    for scheme in ('signed', 'offset'):
        errors: list[float] = []
        for init in ('mse', 'lsq'):
            quantizer = LSQ(bits=8, scheme=scheme, init=init)
            quantizer.set_grid(quantizer.initial_activation_grid(_seen(x)))
            errors.append(float((quantizer(x) - x).detach().pow(2).mean()))
        assert errors[0] <= errors[1] * 0.5


def test_an_uninitialized_quantizer_raises_and_names_the_call() -> None:
    """Unless it is disabled."""
    quantizer, x = LSQ(), torch.randn(3)
    with pytest.raises(UserError, match='calibrating'):
        quantizer(x)
    quantizer.enabled = False
    assert quantizer(x) is x


@pytest.mark.parametrize('cls', [LSQ, LSQPlus])
def test_saved_and_loaded(cls: type[LSQ]) -> None:
    """Steps, zero point and the initialized flag travel through a file loaded safely."""
    source = _ready(cls(bits=4, scheme='offset'), 0.3, zero_point=5.0)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = cls(bits=4, scheme='offset')
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(100)
    assert target.ready
    assert torch.equal(target(x), source(x))

    target.load_state_dict(cls(bits=4, scheme='offset').state_dict())
    assert not target.ready


def test_a_checkpoint_of_the_other_parametrization_is_not_mistaken() -> None:
    """A log step never loads as a linear one."""
    with pytest.raises(RuntimeError, match='linear_step'):
        LSQ(step='linear').load_state_dict(LSQ(step='log').state_dict())


def test_a_copy_made_before_initialization_follows_its_buffers() -> None:
    """As an EMA does: copied early, tensors overwritten later."""
    source = LSQ()
    average = copy.deepcopy(source)
    _ready(source, 0.1)
    for ours, theirs in zip(average.state_dict().values(), source.state_dict().values(), strict=True):
        ours.copy_(theirs)
    assert average.ready


def test_lsqplus_learns_an_integer_zero_point() -> None:
    """The learned value is real; the value in use is the nearest integer inside the range."""
    quantizer = _ready(LSQPlus(bits=4, scheme='offset', step='linear'), 0.5)
    for learned, used in [(3.4, 3), (3.6, 4), (-2.0, 0), (99.0, 15)]:
        with torch.no_grad():
            quantizer.zero_point.fill_(learned)
        assert quantizer.integer_zero_point.tolist() == [used]
        assert quantizer(torch.zeros(1)).item() == 0.0
    y = quantizer(torch.tensor([-100.0, -1.0, 100.0]))
    y.sum().backward()
    # At zero point 15 the range ends at zero: only the value within it does not move it.
    scale = 1 / (3 * 15) ** 0.5
    torch.testing.assert_close(quantizer.zero_point.grad, torch.tensor([2 * -0.5 * scale]))
    assert {name for name, _ in quantizer.named_parameters()} == {'linear_step', 'zero_point'}


def test_lsq_keeps_its_zero_point_out_of_training() -> None:
    """A buffer, not a parameter."""
    quantizer = LSQ(scheme='offset')
    assert [name for name, _ in quantizer.named_parameters()] == ['log_step']
    assert 'zero_point' in quantizer.state_dict()
    assert LSQPlus(scheme='signed').zero_point is None


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(bits=1), 'bits is 1.*from 2 to 8'),
        (dict(bits=True), 'bits is True'),
        (dict(scheme='affine'), "scheme is 'affine'.*'signed', 'unsigned', 'offset'"),
        (dict(init='kl'), "init is 'kl'"),
        (dict(step='exp'), "step is 'exp'"),
        (dict(scheme='offset', narrow=True), "narrow=True needs scheme='signed'"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    """One message with the key, the value and what is allowed."""
    with pytest.raises(UserError, match=message):
        LSQ(**kwargs)


@pytest.mark.parametrize('cls', [LSQ, LSQPlus])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(cls: type[LSQ], dtype: torch.dtype) -> None:
    """Forward and backward of a whole quantizer, and the same numbers."""
    quantizer = _ready(cls(bits=4, scheme='offset'), 0.2, zero_point=3.0)
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    inputs = (x, *quantizer.parameters())
    expected = torch.autograd.grad(quantizer(x).float().square().sum(), inputs)
    compiled = torch.compile(quantizer, backend='aot_eager', fullgraph=True)
    grads = torch.autograd.grad(compiled(x).float().square().sum(), inputs)
    torch.testing.assert_close(grads, expected)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.cuda
@pytest.mark.parametrize('step', ['log', 'linear'])
def test_never_waits_for_the_device_and_can_be_captured(step: str) -> None:
    """Forward and backward raise no synchronization and replay as a CUDA graph."""
    quantizer = _ready(LSQPlus(bits=4, scheme='offset', step=step), 0.2, zero_point=3.0).cuda()
    x = torch.randn(4, 8, 16, 16, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    inputs = (x, *quantizer.parameters())
    assert quantizer.ready
    torch.cuda.set_sync_debug_mode('error')
    try:
        expected = torch.autograd.grad(quantizer(x).float().square().sum(), inputs)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(quantizer(x).float().square().sum(), inputs)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        grads = torch.autograd.grad(quantizer(x).float().square().sum(), inputs)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(grads, expected)


def test_a_zero_point_with_the_rounding_error_of_an_ema_is_still_an_integer() -> None:
    quantizer = LSQ(bits=4, scheme='offset')
    quantizer.set_grid(Grid(torch.tensor([0.1]), torch.tensor([3.0])))
    quantizer.zero_point += 1e-5
    assert quantizer(torch.zeros(4)).tolist() == [0.0] * 4
    assert quantizer.integer_zero_point.tolist() == [3.0]
