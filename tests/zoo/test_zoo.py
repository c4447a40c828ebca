# SPDX-License-Identifier: Apache-2.0
"""Detectors of MMDetection's zoo pass all stages with only their configs. ``make test-zoo`` checks all of them.

``pytest tests/zoo -m cuda`` checks all of them on a GPU, in bf16. To share a GPU, start several processes, each with
``ZOO_PART=1/4``, ``2/4``, ... in its environment. ``ZOO_RESULTS`` names a file to which each process appends one line
of JSON per detector. ``benchmarks/zoo_table.py`` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, FULL_SIZE, Family
from harness import Result, check, zoo_config
from torch.nn import functional as F

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def part(families: Sequence[Family]) -> list[Family]:
    """Return every n-th detector, starting from the m-th, if the environment has ``ZOO_PART=m/n``."""
    index, _, count = os.environ.get('ZOO_PART', '1/1').partition('/')
    return list(families[int(index) - 1 :: int(count)])


def expect_success(result: Result) -> None:
    if result.error is not None:
        raise AssertionError(f'{result.failed}: {result.reason}') from result.error
    assert result.fp32_reason is None


def record(family: Family, result: Result, size: int) -> None:
    """Append the result of a run on a GPU to the file that the environment names."""
    path = os.environ.get('ZOO_RESULTS')
    if path:
        line: dict[str, Any] = dict(name=family.name, size=size, failed=result.failed, reason=result.reason)
        line.update(fp32_reason=result.fp32_reason, seconds=round(result.seconds, 1))
        with Path(path).open('a') as file:
            file.write(json.dumps(line) + '\n')


@pytest.mark.parametrize(
    'family',
    [pytest.param(family, id=family.name, marks=() if family.in_ci else pytest.mark.zoo) for family in FAMILIES],
)
def test_a_detector_of_the_zoo_works(family: Family, tmp_path: Path) -> None:
    expect_success(check(zoo_config(family.config, family.size, family.shrink, family.changes), tmp_path))


@pytest.fixture
def strict_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make autocast on the CPU refuse the function that autocast on CUDA refuses."""
    original = F.binary_cross_entropy

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled('cpu'):
            raise RuntimeError('torch.nn.functional.binary_cross_entropy is unsafe to autocast')
        return original(*args, **kwargs)

    monkeypatch.setattr(F, 'binary_cross_entropy', refuse)


@pytest.mark.usefixtures('strict_autocast')
@pytest.mark.parametrize(
    'family',
    [
        pytest.param(family, id=family.name, marks=() if family.name == 'TOOD' else pytest.mark.zoo)
        for family in FAMILIES
    ],
)
def test_a_detector_of_the_zoo_works_under_autocast_on_the_cpu(family: Family, tmp_path: Path) -> None:
    # In bf16, oneDNN leaves the gradient of a strided convolution uninitialized if its input is a single pixel.
    config = zoo_config(family.config, max(family.size, 128), family.shrink, family.changes)
    expect_success(check(config, tmp_path, autocast=True))


def expect_success_on_a_gpu(family: Family, tmp_path: Path) -> None:
    config = zoo_config(family.config, family.size, family.shrink, family.changes)
    result = check(config, tmp_path, device='cuda', autocast=True)
    record(family, result, family.size)
    expect_success(result)


@on_gpu
@pytest.mark.cuda
@pytest.mark.zoo
@pytest.mark.parametrize('family', [pytest.param(family, id=family.name) for family in part(FAMILIES)])
def test_a_detector_of_the_zoo_works_on_a_gpu(family: Family, tmp_path: Path) -> None:
    expect_success_on_a_gpu(family, tmp_path)


@on_gpu
@pytest.mark.cuda
@pytest.mark.zoo
@pytest.mark.parametrize('family', [pytest.param(family, id=family.name) for family in part(FULL_SIZE)])
def test_a_detector_of_full_size_works_on_a_gpu(family: Family, tmp_path: Path) -> None:
    expect_success_on_a_gpu(family, tmp_path)


def test_a_failing_stage_is_named_with_its_reason(tmp_path: Path) -> None:
    """RetinaNet without BatchNorm has no feature prior for synthesis, but passes the stages before it."""
    changes = {
        'model.backbone.depth': 18,
        'model.neck.in_channels': [16, 32, 64, 128],
        'model.backbone.norm_cfg': dict(_delete_=True, type='GN', num_groups=4),
        'model.backbone.norm_eval': False,
    }
    result = check(zoo_config('retinanet/retinanet_r50_fpn_1x_coco.py', changes=changes), tmp_path)
    assert not result.works
    assert result.failed == 'synthesize'
    assert 'no feature prior of zsq.synthesis.priors applies' in result.reason
    assert result.quantized and not result.floats
