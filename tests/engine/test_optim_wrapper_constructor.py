# SPDX-License-Identifier: Apache-2.0
"""Joined parameter groups against MMEngine's one group a parameter: fewer of them, and the same steps."""

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
from mmzsq.quantization import QuantizationConfig, calibrating, prepare, quantized_layers

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


def test_groups_are_joined_and_steps_stay_the_same(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    joined = wrap(model, 'mmzsq.GroupedOptimWrapperConstructor')
    stock = wrap(other, 'DefaultOptimWrapperConstructor')
    groups = joined.optimizer.param_groups
    # Weights decay; norms and biases do not; steps have a rate of their own.
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


def test_weights_learn_at_rates_in_proportion_to_their_size(model: nn.Module) -> None:
    layers = [layer for _, layer in quantized_layers(model)]
    with torch.no_grad():
        # Their geometric mean is 2.
        for layer, size in zip(layers, (0.5, 4.0, 4.0), strict=True):
            layer.weight.copy_(size * torch.randn_like(layer.weight).sign())
    groups = wrap(model, 'mmzsq.GroupedOptimWrapperConstructor', relative_lr=True).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    assert [rates[id(layer.weight)] for layer in layers] == [0.25 * LR, 2 * LR, 2 * LR]
    # Of all else they are what they are without.
    for name, parameter in model.named_parameters():
        if not any(parameter is layer.weight for layer in layers):
            assert rates[id(parameter)] == pytest.approx(10 * LR if '_quantizer.' in name else LR)
    # Rates of two sizes make two groups of the one.
    assert len(groups) == 4 and all('weight_decay' in group for group in groups)


@pytest.mark.parametrize('kdim', [None, 3], ids=['in one parameter', 'in three'])
def test_projections_of_attention_learn_at_a_rate_of_their_own(kdim: int | None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=kdim, vdim=kdim)
            self.output = nn.Linear(4, 4)

    network = Attention()
    prepare(network, QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4, first_bits='same', last_bits='same')))
    weights = {name: p for name, p in network.named_parameters() if p.dim() == 2}
    projections = {name for name in weights if 'proj_weight' in name}
    assert len(projections) == (1 if kdim is None else 3) and len(weights) == len(projections) + 2
    with torch.no_grad():
        for name, weight in weights.items():
            # Against the geometric mean of all.
            size = 2.0 ** (2 if name in projections else -len(projections))
            weight.copy_(size * torch.randn_like(weight).sign())
    groups = wrap(network, 'mmzsq.GroupedOptimWrapperConstructor', relative_lr=True).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}
    for name, weight in weights.items():
        assert rates[id(weight)] == (4 if name in projections else 0.5 ** len(projections)) * LR


def test_a_parameter_that_comes_twice_is_learnt_once() -> None:
    shared, single = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [
        dict(params=[shared], lr=1.0), dict(params=[single], lr=2.0), dict(params=[shared], lr=2.0)
    ]  # fmt: skip
    assert join_groups(groups) == [dict(params=[shared], lr=1.0), dict(params=[single], lr=2.0)]
    assert join_groups([*groups, dict(params=[shared], lr=3.0)]) == join_groups(groups)
