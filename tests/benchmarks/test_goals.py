# SPDX-License-Identifier: Apache-2.0
"""Goals of docs/performance.md, measured on the current GPU by ``make benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import measure, parse
from speed_cases import CASES, Case, lookup

pytestmark = pytest.mark.benchmark
WITH_GOALS = [case for case in CASES if case.goals]


@pytest.fixture(params=WITH_GOALS, ids=[case.name for case in WITH_GOALS], scope='module')
def result(request: pytest.FixtureRequest, repo: Path) -> tuple[Case, dict[str, Any]]:
    """A case and its result."""
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device: the goals are those of one H100')
    case = request.param
    config, *options = case.arguments()
    return case, measure(parse([str(repo / config), *options, '--out', 'unused.json']))


def test_goals_are_met(result: tuple[Case, dict[str, Any]]) -> None:
    case, measured = result
    missed = [
        f'{goal.key} is {goal.measured(measured)}, the goal {goal.limit}'
        for goal in case.goals
        if not (goal.measured(measured) or float('inf')) <= goal.limit
    ]
    assert not missed, f'{case.title} on {measured["device"]}: {"; ".join(missed)}'


def test_steps_run_as_cuda_graphs(result: tuple[Case, dict[str, Any]]) -> None:
    _, measured = result
    if 'synthesis' in measured:
        step = measured['synthesis']
        assert step['cuda_graph'], step['eager_reason']
        assert step['graph_launches'] == 1
        # Only the learning rate and little else.
        assert step['launches'] < 20
    if 'training' in measured:
        assert lookup(measured, 'training.steps.distilled.graph_launches') == 1
