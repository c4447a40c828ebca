# SPDX-License-Identifier: Apache-2.0
"""Merged parameter groups take the same steps as MMEngine's, with fewer groups."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmzsq.engine.optim_wrapper_constructor import join_groups
from mmzsq.quantization import QuantizationConfig, calibrating, prepare

PARAMWISE = dict(
    norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'_quantizer.': dict(lr_mult=10.0, decay_mult=0.0)}
)


LR = 1e-2


def wrap(model: nn.Module, constructor: str, **paramwise: Any) -> OptimWrapper:
    return build_optim_wrapper(
        model,
        dict(
            constructor=constructor,
            optimizer=dict(type='AdamW', lr=LR, weight_decay=0.1),
            paramwise_cfg=dict(copy.deepcopy(PARAMWISE), **paramwise),
            clip_grad=dict(max_norm=1.0),
        ),
    )


@pytest.fixture
def model() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    prepare(
        network, QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4)), run=lambda: network(torch.rand(1, 3, 8, 8))
    )
    with torch.no_grad(), calibrating(network):
        network(torch.rand(2, 3, 8, 8))
    return network


def test_merged_groups_take_the_same_steps(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    joined = wrap(model, 'mmzsq.GroupedOptimWrapperConstructor')
    stock = wrap(other, 'DefaultOptimWrapperConstructor')
    groups = joined.optimizer.param_groups
    # Weights decay; norms and biases do not; quantizer steps have another rate.
    assert len(groups) == 3 < len(stock.optimizer.param_groups)
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    images = torch.rand(2, 3, 8, 8)
    for _ in range(3):
        for network, wrapper in ((model, joined), (other, stock)):
            wrapper.update_params(network(images).square().mean())
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_the_log_names_groups_not_parameters(model: nn.Module) -> None:
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        wrap(model, 'mmzsq.GroupedOptimWrapperConstructor')
        logger.info('paramwise_options of others')
    finally:
        logger.removeHandler(handler)
    *groups, after = messages
    assert len(groups) == 3 and all(message.startswith('optimizer: ') for message in groups)
    assert after == 'paramwise_options of others'


def test_a_parameter_in_two_groups_stays_in_the_first() -> None:
    shared, single = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [
        dict(params=[shared], lr=1.0), dict(params=[single], lr=2.0), dict(params=[shared], lr=2.0)
    ]  # fmt: skip
    assert join_groups(groups) == [dict(params=[shared], lr=1.0), dict(params=[single], lr=2.0)]
    assert join_groups([*groups, dict(params=[shared], lr=3.0)]) == join_groups(groups)


def scaled(size: float) -> nn.Module:
    """A network with weights of a root mean square of ``size``, ``size`` and ``100 * size``, and a BatchNorm."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    with torch.no_grad():
        for index, factor in ((0, 1.0), (2, 1.0), (3, 100.0)):
            weight = network[index].weight
            weight.mul_(factor * size / weight.square().mean().sqrt())
    return network


@pytest.mark.parametrize(('size', 'factor'), [(0.02, 1.0), (0.04, 1.0), (0.1, 2.5), (4.0, 10.0)])
def test_large_weights_learn_as_much_faster(size: float, factor: float) -> None:
    wrapper = wrap(scaled(size), 'mmzsq.GroupedOptimWrapperConstructor', weight_size=0.04)
    assert all(group['lr'] == pytest.approx(factor * LR) for group in wrapper.optimizer.param_groups)


def test_steps_of_quantizers_keep_their_rate(model: nn.Module) -> None:
    wrapper = wrap(model, 'mmzsq.GroupedOptimWrapperConstructor', weight_size=0.01)
    rates = {id(p): group['lr'] for group in wrapper.optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        if '_quantizer.' in name:
            assert rates[id(parameter)] == pytest.approx(10 * LR)
        else:
            assert rates[id(parameter)] > 1.5 * LR


def test_without_a_size_the_rate_stays() -> None:
    wrapper = wrap(scaled(4.0), 'mmzsq.GroupedOptimWrapperConstructor', weight_size=None)
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {LR}
