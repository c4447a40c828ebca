# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/ruler.py: statistics against scipy, the plan of the pairs, and reading of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ruler
from scipy import stats

from mmzsq.errors import UserError

CONFIG = 'configs/zsq/yolov5-p_shapes_w4a4.py'


def recipe(**options: Any) -> dict[str, Any]:
    return dict(config=CONFIG, common=[], a=[], b=['zsq.train.lr=0.1'], sets=None, seeds=[4, 5]) | options


@pytest.mark.parametrize('count', [2, 6, 9])
def test_statistics_are_those_of_scipy(count: int) -> None:
    a, b = np.random.default_rng(count).normal((20, 20.7), 0.5, (count, 2)).T
    differences = (b - a).tolist()
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert ruler.paired_interval(differences) == pytest.approx((expected.low, expected.high))
    flips = stats.permutation_test((b, a), lambda x, y: np.mean(x - y), permutation_type='samples', n_resamples=np.inf)
    assert ruler.sign_flip_p(differences) == pytest.approx(flips.pvalue)


def test_sign_flip_interval_holds_what_the_test_does_not_reject() -> None:
    differences = np.random.default_rng(1).normal(0.3, 0.5, 8)
    low, high = ruler.sign_flip_interval(differences.tolist())
    assert low is not None and high is not None
    # Between the ends, the p-value of the shifted differences is above 5 %; beyond them it is not.
    inside, beyond = 1e-3, -1e-3
    for end, inwards in ((low, 1), (high, -1)):
        assert ruler.sign_flip_p((differences - end - inwards * inside).tolist()) > 0.05
        assert ruler.sign_flip_p((differences - end - inwards * beyond).tolist()) <= 0.05
    assert ruler.sign_flip_interval([0.1] * 5) == (None, None)


def test_six_pairs_reach_their_smallest_interval() -> None:
    differences = [0.3, 0.1, 0.5, 0.2, 0.4, 0.6]
    assert ruler.sign_flip_interval(differences) == pytest.approx((0.1, 0.6))
    result = ruler.compare(differences)
    assert result['flip_p'] == 2 / 64 and result['mean'] == pytest.approx(0.35)
    assert result['verdict'] == 'B is better'
    assert ruler.compare([-value for value in differences])['verdict'] == 'A is better'
    assert ruler.compare(differences[:5])['verdict'] == 'too few pairs'
    assert ruler.compare([*differences[:5], -0.1])['verdict'] == 'no difference shown'


def test_exact_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for sample in generator.laplace(0.5, 1, (400, 7)):
        low, high = ruler.sign_flip_interval(sample.tolist())
        assert low is not None and high is not None
        covered += low <= 0.5 <= high
    # 96.9 % of 400 runs, with four standard deviations.
    assert covered / 400 == pytest.approx(0.969, abs=0.035)


def test_sides_of_a_pair_share_set_and_seed(tmp_path: Path) -> None:
    jobs = ruler.plan(recipe(), tmp_path)
    assert [job.name for job in jobs] == ['set_seed4', 'a_seed4', 'b_seed4', 'set_seed5', 'a_seed5', 'b_seed5']
    assert all(job.needs == ('set_seed4',) for job in jobs[1:3])
    folder = f'zsq.calibration_set.dir={tmp_path / "set_seed4" / "calibration_set"}'
    assert all(folder in job.command and 'zsq.calibration_set.seed=4' in job.command for job in jobs[:3])
    assert 'zsq.train.lr=0.1' in jobs[2].command and 'zsq.train.lr=0.1' not in (*jobs[0].command, *jobs[1].command)


def test_recipes_of_sets_have_sets_of_their_own(tmp_path: Path) -> None:
    jobs = ruler.plan(recipe(b=['zsq.synthesis.balance=None'], seeds=[4]), tmp_path)
    assert [job.name for job in jobs] == ['set_a_seed4', 'a_seed4', 'set_b_seed4', 'b_seed4']
    assert jobs[3].needs == ('set_b_seed4',) and 'zsq.synthesis.balance=None' in jobs[2].command


def test_finished_sets_are_used(tmp_path: Path) -> None:
    jobs = ruler.plan(recipe(sets=str(tmp_path / 'set{seed}')), tmp_path)
    assert [job.name for job in jobs] == ['a_seed4', 'b_seed4', 'a_seed5', 'b_seed5']
    assert f'zsq.calibration_set.dir={tmp_path / "set5"}' in jobs[2].command and not jobs[2].needs


def write_run(folder: Path, ap: float | None, set_dir: str) -> None:
    folder.mkdir(parents=True)
    results = dict(
        metrics={} if ap is None else dict(zero_shot={'coco/bbox_mAP': ap}),
        quantizer={},
        model_mb={},
        settings=dict(calibration_set=dict(dir=set_dir)),
        seconds=dict(train=60.0, evaluate_float=3.0),
        calibration_set=dict(stages=dict(refine=dict(seconds=27.0), synthesize=dict(seconds=30.0))),
        versions=dict(mmzsq='1.2.3'),
        device='a GPU',
        evaluation_images=200,
    )
    (folder / 'results.json').write_text(json.dumps(results))


def test_finished_pairs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / 'ruler'
    ruler.kept_recipe(recipe(seeds=[0, 1, 2, 3]), work)
    for seed, b in enumerate((0.25, 0.28, 0.27)):
        write_run(work / f'a_seed{seed}', 0.24, 'set')
        write_run(work / f'b_seed{seed}', b, 'set')
    write_run(work / 'a_seed3', 0.24, 'set')
    ruler.main(['--work-dir', str(work), '--read', '--out', str(tmp_path / 'kept.json')])
    result = json.loads((tmp_path / 'kept.json').read_text())
    assert result == json.loads((work / 'ruler.json').read_text())
    assert [(pair['seed'], round(pair['b'] - pair['a'], 6)) for pair in result['pairs']] == [(0, 1), (1, 4), (2, 3)]
    expected = stats.ttest_1samp([1, 4, 3], 0).confidence_interval()
    assert result['interval'] == pytest.approx([expected.low, expected.high])
    # Two runs of 63 s, and one set of 57 s.
    assert result['minutes'] == pytest.approx(183 / 60, abs=0.01)
    text = capsys.readouterr().out
    assert 'B - A: +2.67 coco/bbox_mAP' in text and 'too few pairs' in text
    assert '3 pairs, 200 images; a pair takes 3.0 minutes on a GPU' in text
    write_run(work / 'b_seed3', None, 'set')
    with pytest.raises(SystemExit, match='b_seed3 has no accuracy of the row zero_shot'):
        ruler.main(['--work-dir', str(work), '--read'])


def test_a_folder_keeps_one_comparison(tmp_path: Path) -> None:
    ruler.kept_recipe(recipe(), tmp_path)
    assert ruler.kept_recipe(recipe(seeds=[4, 5, 6]), tmp_path)['seeds'] == [4, 5, 6]
    assert ruler.kept_recipe(None, tmp_path) == recipe(seeds=[4, 5, 6])
    with pytest.raises(UserError, match='other recipes'):
        ruler.kept_recipe(recipe(b=['zsq.train.lr=0.2']), tmp_path)
    with pytest.raises(UserError, match=r'no recipe\.json'):
        ruler.kept_recipe(None, tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='0 finished pairs'):
        ruler.read(recipe(), tmp_path)
