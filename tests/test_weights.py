# SPDX-License-Identifier: Apache-2.0
"""The strict check of weights: each tensor is there and fits, and nothing is left over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mmzsq.errors import UserError
from mmzsq.weights import fitting_weights, is_quantized

State = dict[str, Tensor]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(backbone=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), bbox_head=nn.Linear(4, 2))
    )


def fit(model: nn.Module, loaded: Any) -> State:
    return fitting_weights(model.state_dict(), loaded, 'file.pth', 'Do this.')


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'student.', 'module.model.', '_orig_mod.', 'any_name.'])
@pytest.mark.parametrize('container', ['state_dict', 'model', None])
def test_prefixes_that_all_names_share_are_removed(model: nn.Module, prefix: str, container: str | None) -> None:
    own = model.state_dict()
    state = {prefix + name: value for name, value in own.items()}
    assert_equal(fit(model, {container: state} if container else state), own)


def test_a_detector_with_one_part_keeps_its_prefix() -> None:
    model = nn.Sequential(OrderedDict(backbone=nn.Conv2d(3, 4, 1)))
    assert_equal(fit(model, model.state_dict()), model.state_dict())


def test_averaged_models_are_read(model: nn.Module) -> None:
    averages = AveragedModel(model), ExponentialMovingAverage(model)
    for average in averages:
        assert_equal(fit(model, dict(state_dict=average.state_dict())), model.state_dict())
    assert_equal(fit(model, dict(ema_state_dict=averages[1].state_dict())), model.state_dict())


def test_the_averaged_weights_are_taken_where_a_checkpoint_has_both(model: nn.Module) -> None:
    """EMAHook swaps them: ``state_dict`` is the average, ``ema_state_dict`` what was trained."""
    other = {f'module.{name}': value + 1 for name, value in model.state_dict().items()}
    assert_equal(fit(model, dict(state_dict=model.state_dict(), ema_state_dict=other)), model.state_dict())
    # MMDetection 2.x: buffers of the detector.
    buffers = {f'ema_{name}'.replace('.', '_'): value + 1 for name, value in model.state_dict().items()}
    assert_equal(fit(model, dict(state_dict={**model.state_dict(), **buffers})), model.state_dict())


def test_counters_and_constants_may_differ(model: nn.Module) -> None:
    state = model.state_dict()
    expected = {name: value for name, value in state.items() if not name.endswith('num_batches_tracked')}
    extra = {'data_preprocessor.mean': torch.zeros(3), 'backbone.0.num_batches_tracked': torch.tensor(1)}
    assert_equal(fit(model, dict(state_dict={**expected, **extra})), expected)


def without(name: str) -> Callable[[State], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def replaced(**values: Any) -> Callable[[State], Any]:
    return lambda state: {**state, **{key.replace('__', '.'): value for key, value in values.items()}}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (without('bbox_head.weight'), r'1 weights are missing \(bbox_head\.weight\)'),
        (without('backbone.1.running_var'), r'missing \(backbone\.1\.running_var\)'),
        (
            replaced(bbox_head__weight=torch.zeros(3, 4)),
            r'fit \(bbox_head\.weight is \(3, 4\) .* \(2, 4\) in the',
        ),
        (replaced(bbox_head__weight=torch.zeros(2, 4, dtype=torch.int8)), 'bbox_head.weight is torch.int8'),
        (replaced(bbox_head__weight=torch.zeros(2, 4, dtype=torch.complex64)), 'torch.complex64'),
        (replaced(bbox_head__weight=torch.zeros(2, 4).to_sparse()), 'layout torch.sparse'),
        (replaced(bbox_head__weight=torch.zeros(2, 4, device='meta')), 'without values'),
        (replaced(bbox_head__weight=np.zeros((2, 4))), 'bbox_head.weight is a ndarray'),
        (replaced(neck__weight=torch.zeros(1)), r'1 weights are left over \(neck\.weight\)'),
        (lambda state: {f'mod.{k}' if 'head' in k else k: v for k, v in state.items()}, 'nearest to .* mod.bbox_head'),
        (
            lambda state: {f'{part}.{k}': v for k, v in state.items() for part in ('student', 'teacher')},
            'has the parts student, teacher',
        ),
        (lambda state: {k: v.numpy() for k, v in state.items()}, 'ndarray in the checkpoint, not a tensor'),
        (lambda state: {}, 'no weights'),
        (lambda state: {'epoch': 3}, 'no weights'),
    ],
)
def test_the_message_names_the_first_differences(
    model: nn.Module, change: Callable[[State], Any], message: str
) -> None:
    for loaded in (dict(state_dict=change(model.state_dict())), change(model.state_dict())):
        with pytest.raises(UserError, match=rf'^file\.pth.*{message}.*Do this\.$'):
            fit(model, loaded)


def test_students_are_recognized_by_their_steps(model: nn.Module) -> None:
    assert not is_quantized(dict(state_dict=model.state_dict()))
    assert is_quantized({'module.backbone.0.weight_quantizer.step': torch.ones(1)})
    assert is_quantized(dict(state_dict={'backbone.0.input_quantizer.step': torch.ones(1)}))
