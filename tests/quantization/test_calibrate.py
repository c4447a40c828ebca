# SPDX-License-Identifier: Apache-2.0
"""Calibration: steps are initialized once, from the observed inputs, equally on every process."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization import (
    QuantizationConfig,
    calibrating,
    prepare,
    quantizers,
    set_quantization,
    step_parameters,
)
from mmzsq.quantization.step_search import Grid


def _prepared(model: nn.Module, **kwargs: Any) -> nn.Module:
    config = QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4, **kwargs))
    prepare(model, config, run=lambda: model(torch.rand(1, 3, 8, 8)))
    return model


def _steps(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in step_parameters(model)}


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1))


def test_values_pass_in_float_while_calibrating(model: nn.Module, images: Tensor) -> None:
    """Later layers receive the float model's features, and afterwards quantization is on."""
    expected = model(images)['cls'][0]
    _prepared(model)
    with torch.no_grad(), calibrating(model):
        for _ in range(2):
            # The projections of attention are layers of their own now: the same sums in another order.
            torch.testing.assert_close(model(images)['cls'][0], expected, rtol=1e-5, atol=1e-6)
    quantized = model(images)['cls'][0]
    assert not torch.equal(quantized, expected)
    torch.testing.assert_close(quantized, expected, atol=1.0, rtol=0.5)
    assert all(quantizer.ready for _, quantizer in quantizers(model))


def test_steps_fit_all_batches(images: Tensor) -> None:
    """With init='lsq' the step is that of the mean over every value of every batch."""
    model = _prepared(_small(), activation=dict(scheme='signed', init='lsq'))
    batches = [images, images[:1] * 7]
    with torch.no_grad(), calibrating(model):
        for batch in batches:
            model(batch)
    mean = torch.cat([b.flatten() for b in batches]).abs().mean()
    torch.testing.assert_close(model[0].input_quantizer.step, 2 * mean[None] / 127**0.5)


def test_initialized_quantizers_are_left_alone(model: nn.Module, images: Tensor) -> None:
    """A second calibration with other images changes no bit."""
    _prepared(model)
    with torch.no_grad(), calibrating(model):
        model(images)
    before, expected = _steps(model), model(images)['reg'][1]
    with torch.no_grad(), calibrating(model):
        assert torch.equal(model(images)['reg'][1], expected)
        model(images * 100)
    assert all(torch.equal(before[name], step) for name, step in _steps(model).items())


def test_an_initialized_model_needs_no_batch(images: Tensor) -> None:
    """A resumed run may go through the same lines without any data."""
    model = _prepared(_small())
    with torch.no_grad(), calibrating(model):
        model(images)
    before = _steps(model)
    with calibrating(model):
        pass
    assert all(torch.equal(before[name], step) for name, step in _steps(model).items())


def test_a_step_set_by_hand_stays(images: Tensor) -> None:
    """Only what is missing is initialized, within a layer too."""
    model = _prepared(_small())
    by_hand = Grid(torch.tensor([0.125]), torch.tensor([3.0]))
    model[0].input_quantizer.set_grid(by_hand)
    with torch.no_grad(), calibrating(model):
        model(images)
    torch.testing.assert_close(model[0].input_quantizer.step.detach(), by_hand.step)
    assert model[0].weight_quantizer.ready


def test_a_resumed_model_is_not_calibrated_again(images: Tensor) -> None:
    """Saved, loaded with weights_only and used at once, with the same output."""
    model = _prepared(_small())
    with torch.no_grad(), calibrating(model):
        model(images)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = _prepared(_small())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with calibrating(resumed):
        resumed(images * 100)
    assert torch.equal(resumed(images), model(images))


def test_a_deep_copy_is_independent(images: Tensor) -> None:
    """As for an EMA: same output, own steps."""
    model = _prepared(_small())
    with torch.no_grad(), calibrating(model):
        model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        for _, step in step_parameters(model):
            step.add_(1.0)
    assert not torch.equal(twin(images), model(images))


def test_layers_without_input_are_listed(images: Tensor) -> None:
    """No quantizer is initialized then."""
    model = _prepared(_small())
    with pytest.raises(UserError, match='No input reached 2 while calibrating'), calibrating(model):
        model[0](images)
    assert not any(quantizer.ready for _, quantizer in quantizers(model))


def test_inputs_that_are_not_finite_are_listed(images: Tensor) -> None:
    """A NaN must not become a step."""
    model = _prepared(_small())
    with (
        pytest.raises(UserError, match='The input of 0, 2 was infinite or NaN'),
        calibrating(model),
    ):
        model(images * torch.nan)


def test_an_error_inside_leaves_the_model_as_it_was(images: Tensor) -> None:
    """No step, no hook, nothing switched off."""
    model = _prepared(_small())

    def broken_calibration() -> None:
        with calibrating(model):
            model(images)
            raise KeyError('data set')

    with pytest.raises(KeyError):
        broken_calibration()
    assert all(q.enabled and not q.ready for _, q in quantizers(model))
    assert not model[0].input_quantizer._forward_pre_hooks


def test_switch(images: Tensor) -> None:
    """Off is the float model, and stays off through a calibration."""
    model = _small()
    expected = model(images)
    _prepared(model)
    set_quantization(model, False)
    assert torch.equal(model(images), expected)
    with torch.no_grad(), calibrating(model):
        model(images)
    assert torch.equal(model(images), expected)
    set_quantization(model, True)
    assert not torch.equal(model(images), expected)


def test_step_parameters_are_all_parameters_of_quantizers() -> None:
    """Two steps a layer, and with LSQ+ one zero point; names tell which is which."""
    model = _prepared(_small())
    names = [name for name, _ in step_parameters(model)]
    assert names == [f'{n}.{kind}_quantizer.log_step' for n in (0, 2) for kind in ('weight', 'input')]
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in step_parameters(model))
    plus = _prepared(_small(), type='mmzsq.LSQPlus')
    extra = {name for name, _ in step_parameters(plus)} - set(names)
    assert extra == {'0.input_quantizer.zero_point', '2.input_quantizer.zero_point'}


def test_optimizer_built_before_calibration_trains_the_steps(images: Tensor) -> None:
    """Steps keep their identity, so the optimizer never holds a stale tensor."""
    model = _prepared(_small())
    optimizer = torch.optim.Adam([p for _, p in step_parameters(model)], lr=1e-2)
    with torch.no_grad(), calibrating(model):
        model(images)
    before = _steps(model)
    set_quantization(model, False)
    target = model(images).detach()
    set_quantization(model, True)
    (model(images) - target).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], step) for name, step in _steps(model).items())


def _calibrate_on_one_rank(rank: int, folder: Path) -> None:
    """Rank 1 sees other images than rank 0, and more of them; only it reaches the last layer."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    try:
        model = _prepared(_small())
        torch.manual_seed(rank)
        images = torch.rand(1 + 2 * rank, 3, 8, 8) * (1 + rank)
        with torch.no_grad(), calibrating(model):
            model(images) if rank else model[0](images)
        assert not dist.get_rank() or float(model[0].input_quantizer.step) > 0
        torch.save((model.state_dict(), images), folder / f'{rank}.pt')
    finally:
        dist.destroy_process_group()


def test_two_processes_end_with_equal_steps_from_all_images(tmp_path: Path) -> None:
    """They are close to the steps that one process finds on all images."""
    mp.spawn(_calibrate_on_one_rank, args=(tmp_path,), nprocs=2)
    states, images = zip(*(torch.load(tmp_path / f'{r}.pt', weights_only=True) for r in (0, 1)), strict=True)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    single = _prepared(_small())
    with torch.no_grad(), calibrating(single):
        single[0](images[0])
        single(images[1])
    expected = single.state_dict()
    for key, value in states[0].items():
        if key.endswith('log_step'):
            torch.testing.assert_close(value, expected[key], atol=0.03, rtol=0)
