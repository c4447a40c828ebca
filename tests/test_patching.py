# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from mmzsq.patching import patched, patched_forwards


def test_a_method_of_the_class_comes_back() -> None:
    layer = nn.Identity()
    with patched(layer, 'forward', lambda x: x + 1):
        assert layer(torch.tensor(1.0)) == 2
    assert layer(torch.tensor(1.0)) == 1
    assert 'forward' not in vars(layer)


def test_nested_blocks_restore_what_they_found() -> None:
    layer = nn.Identity()
    with patched(layer, 'forward', lambda x: x + 1):
        outer = layer.forward
        with patched(layer, 'forward', lambda x: outer(x) * 10):
            assert layer(torch.tensor(1.0)) == 20
        assert layer(torch.tensor(1.0)) == 2
    assert layer(torch.tensor(1.0)) == 1


def test_an_attribute_of_the_object_itself_is_restored_after_an_error() -> None:
    module = types.ModuleType('module')
    module.limit = 3
    seen = []

    def fail() -> None:
        with patched(module, 'limit', 5):
            seen.append(module.limit)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, module.limit) == ([5], 3)


def test_several_modules_are_patched_together() -> None:
    layers = nn.Sequential(nn.Identity(), nn.Identity())
    with patched_forwards({layer: lambda x: x + 1 for layer in layers}):
        assert layers(torch.tensor(0.0)) == 2
    assert layers(torch.tensor(0.0)) == 0
