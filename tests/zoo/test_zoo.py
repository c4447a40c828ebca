# SPDX-License-Identifier: Apache-2.0
"""Detectors of MMDetection's zoo pass all stages with only their configs. ``make test-zoo`` checks all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, Family
from harness import check, zoo_config


@pytest.mark.parametrize(
    'family',
    [pytest.param(family, id=family.name, marks=() if family.in_ci else pytest.mark.zoo) for family in FAMILIES],
)
def test_a_detector_of_the_zoo_works(family: Family, tmp_path: Path) -> None:
    result = check(zoo_config(family.config, family.size, family.shrink, family.changes), tmp_path)
    if result.error is not None:
        raise AssertionError(f'{result.failed}: {result.reason}') from result.error


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
