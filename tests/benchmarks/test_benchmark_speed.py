# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/speed.py: order, budget, failures and output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark import parse
from mmengine.config import Config
from speed import CaseError, Worker, run
from speed_cases import CASES, STEP, Case, Goal, lookup

from mmzsq.config.compose import complete_section

TINY = Case('Tiny', 'tiny.py', ('synthesis',), 64, 2, seconds=1, goals=(Goal(STEP, 1.0, authors=9.0),))
# Replaces the benchmark in the measuring process: the name of the config selects its behavior.
BENCHMARK = """
import os, time

def parse(words):
    return words

def measure(words):
    if words[0] == 'dies.py':
        os._exit(1)
    if words[0] == 'hangs.py':
        time.sleep(60)
    if words[0] == 'fails.py':
        raise MemoryError('nothing left')
    return dict(words=words, process=os.getpid(), synthesis=dict(ms_per_image_iteration=0.5))
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """Worker process that measures with the module above."""
    (tmp_path / 'benchmark.py').write_text(BENCHMARK)
    worker = Worker('cpu', tmp_path)
    yield worker
    worker.stop()


def written(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json')}


def test_cases_are_measured_one_after_the_other_by_one_process(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [TINY, replace(TINY, batch_size=4)]
    assert run(cases, tmp_path, 60, worker) == []
    results = written(tmp_path)
    assert set(results) == {'tiny_64_b2', 'tiny_64_b4'}
    for case in cases:
        assert results[case.name]['case'] == case.name
        assert results[case.name]['words'][:-4] == case.arguments()
        assert results[case.name]['words'][-4:] == ['--device', 'cpu', '--out', 'unused.json']
    assert len({result['process'] for result in results.values()}) == 1
    assert f'{STEP} 0.5 (goal 1.0)' in capsys.readouterr().out


def test_a_failure_affects_its_case_only(worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails, dies = (replace(TINY, detector=name, config=f'{name}.py') for name in ('fails', 'dies'))
    assert run([fails, dies, TINY], tmp_path, 60, worker) == [fails.name, dies.name]
    assert set(written(tmp_path)) == {TINY.name}
    told = capsys.readouterr().out
    assert 'fails_64_b2: MemoryError: nothing left' in told
    assert 'dies_64_b2: its process died' in told


def test_cases_beyond_the_budget_are_skipped_and_listed(
    worker: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = replace(TINY, detector='Long', seconds=90)
    assert run([long, TINY], tmp_path, 60, worker) == [long.name]
    assert 'long_64_b2: skipped, needs 90 s and 60 s are left' in capsys.readouterr().out
    assert set(written(tmp_path)) == {TINY.name}


def test_a_case_is_stopped_at_the_end_of_the_budget(worker: Worker) -> None:
    with pytest.raises(CaseError, match='not finished after 2 s'):
        worker.measure(['hangs.py'], 2)
    assert worker.measure(['tiny.py'], 60)['words'][0] == 'tiny.py'


def test_a_goal_is_looked_up_in_a_result() -> None:
    [goal] = TINY.goals
    assert goal.measured(dict(synthesis=dict(ms_per_image_iteration=0.5))) == 0.5
    assert goal.measured(None) is None
    assert lookup(dict(a=dict(b=None)), 'a.b.c') is None


def test_every_case_is_a_valid_command_with_a_unique_name(repo: Path) -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        args = parse([*case.arguments(), '--out', 'unused.json'])
        cfg = Config.fromfile(repo / args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        assert complete_section(cfg.zsq.to_dict())['preset'] == 'default'
        assert (args.precision, args.batch_size) == ('bf16', case.batch_size)
        measured = {goal.key.split('.')[0] for goal in case.goals}
        assert measured <= set(case.what)


def test_the_small_rtmdet_is_that_of_mmdetection(repo: Path) -> None:
    import mmdet

    [case] = [case for case in CASES if case.detector == 'RTMDet-tiny']
    cfg = Config.fromfile(repo / case.config)
    cfg.merge_from_dict(parse([*case.arguments(), '--out', 'unused.json']).cfg_options)
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'
    tiny = Config.fromfile(configs / 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model
    for model in (cfg.model, tiny):
        model.backbone.pop('init_cfg', None)
    cfg.model.pop('_scope_')
    assert cfg.model.to_dict() == tiny.to_dict()
