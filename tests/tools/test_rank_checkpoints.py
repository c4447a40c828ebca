# SPDX-License-Identifier: Apache-2.0
"""Tests of tools that read checkpoints of a student: rank_checkpoints.py and calibrate_scores.py."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner.checkpoint import load_from_local

from mmzsq import generate, train
from mmzsq.errors import UserError
from mmzsq.qat import score_offset

TOOL = 'tools/analysis_tools/rank_checkpoints.py'
CALIBRATE = 'tools/model_converters/calibrate_scores.py'
LEAF = 'configs/zsq/yolov5-p_shapes_w4a4.py'
SMALL = (
    *('zsq.calibration_set.num_images=4', 'zsq.label_sampler.warmup=1', 'zsq.label_sampler.interval=1'),
    *('zsq.synthesis.relabel.image_size=64', 'zsq.synthesis.relabel.iterations=2'),
    *('zsq.synthesis.synthesize.image_size=64', 'zsq.synthesis.synthesize.iterations=2'),
    *('zsq.train.max_epochs=1', 'zsq.train.batch_size=2', 'zsq.train.num_workers=0', 'zsq.train.init_batches=1'),
    *('zsq.quantizer.weight.init=lsq', 'zsq.quantizer.activation.init=lsq'),
    *('val_dataloader.dataset.num_images=1', 'val_dataloader.dataset.image_size=64'),
    *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
    'val_dataloader.dataset.pipeline.0.to_float32=True',
)
Run = Callable[..., None]


@pytest.fixture
def run(repo: Path, tmp_path: Path, unformatted_configs: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a tool as a user does, in a folder of the test."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[], None], *options: str, small: tuple[str, ...] = SMALL) -> None:
        monkeypatch.setattr(sys, 'argv', ['tool', str(repo / LEAF), *options, '--cfg-options', *small])
        main()

    return run


@pytest.mark.filterwarnings('ignore:.*instance named of visualizer:UserWarning')
def test_a_student_is_ranked_above_one_that_was_spoilt(
    run: Run, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(repo / TOOL))
    run(train.main, '--work-dir', 'run')
    run(generate.main, '--work-dir', 'other', small=(*SMALL, 'zsq.calibration_set.seed=1'))
    spoilt = load_from_local('run/epoch_1.pth', map_location='cpu')
    for name, value in spoilt['state_dict'].items():
        if name.endswith('conv.weight'):
            value += value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    torch.save(spoilt, 'spoilt.pth')
    checkpoints = ('spoilt.pth', 'run/epoch_1.pth', 'run/ptq.pth')
    held_out = ('--held-out', 'other/calibration_set')
    run(tool['main'], *held_out, '--out', 'ranks.json', '--work-dir', 'ranks', '--checkpoints', *checkpoints)
    ranks = json.loads(Path('ranks.json').read_text())
    loss = {row['checkpoint']: row['loss'] for row in ranks['checkpoints']}
    assert list(loss) == ['spoilt.pth', 'epoch_1.pth', 'ptq.pth']
    assert loss['spoilt.pth'] > 1.5 * loss['epoch_1.pth'] > 0
    assert ranks['held_out'] == dict(images=4, seed=1)
    assert all('coco/bbox_mAP' in row['metrics'] for row in ranks['checkpoints'])
    # The same loss each time, whatever was measured before.
    run(tool['main'], *held_out, '--out', 'again.json', '--work-dir', 'ranks', '--checkpoints', 'run/epoch_1.pth')
    (again,) = json.loads(Path('again.json').read_text())['checkpoints']
    assert again['loss'] == pytest.approx(loss['epoch_1.pth'], rel=1e-5)
    # No location of so small images has a score that counts.
    monkeypatch.setattr(score_offset, 'score_offset', lambda *args: 0.5)
    _check_calibrated(run, repo)


def _check_calibrated(run: Run, repo: Path) -> None:
    """The checkpoint with other scores differs from the student by one offset of its objectness."""
    main = runpy.run_path(str(repo / CALIBRATE))['main']
    run(main, 'spoilt.pth', 'calibrated.pth', '--batches', '1', '--work-dir', 'run')
    before, after = (load_from_local(name, map_location='cpu') for name in ('spoilt.pth', 'calibrated.pth'))
    assert after.keys() == before.keys() and after['meta'] == before['meta']
    changed = {
        name: after['state_dict'][name] - value
        for name, value in before['state_dict'].items()
        if not torch.equal(after['state_dict'][name], value)
    }
    assert changed.keys() == {f'bbox_head.convs.{scale}.bias' for scale in range(3)}
    for change in changed.values():
        entries = change.view(3, -1)
        assert not entries[:, [*range(4), *range(5, entries.shape[1])]].any()
        torch.testing.assert_close(entries[:, 4], torch.full((3,), 0.5))
    with pytest.raises(UserError, match=r'checkpoint absent\.pth does not exist'):
        run(main, 'absent.pth', 'out.pth')


def test_two_rankings_are_compared(repo: Path) -> None:
    correlation = runpy.run_path(str(repo / TOOL))['correlation']

    def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [
            dict(checkpoint='', loss=loss, metrics={'coco/cat_precision': 0.5, 'coco/bbox_mAP': ap})
            for loss, ap in pairs
        ]

    agree = correlation(rows((3.0, 0.1), (2.0, 0.2), (1.0, 0.3)))
    assert (agree['metric'], agree['spearman'], agree['kendall']) == ('coco/bbox_mAP', 1.0, 1.0)
    # One pair of six is the other way round: (5 - 1) / 6, and 1 - 6 * 2 / (4 * 15).
    nearly = correlation(rows((4.0, 0.1), (3.0, 0.2), (2.0, 0.4), (1.0, 0.3)))
    assert (nearly['spearman'], nearly['kendall']) == (0.8, pytest.approx(4 / 6, abs=1e-4))
    assert (nearly['metric_of_least_loss'], nearly['metric_of_last'], nearly['best_metric']) == (0.3, 0.3, 0.4)
    assert correlation(rows((1.0, 0.1))) == {}
    assert correlation([dict(checkpoint='', loss=1.0), dict(checkpoint='', loss=2.0)]) == {}


def test_a_mistake_is_one_message(run: Run, repo: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(repo / TOOL))['main']
    with pytest.raises(UserError, match=r'checkpoint absent\.pth does not exist'):
        run(main, '--held-out', 'set', '--checkpoints', 'absent.pth')
    Path('there.pth').touch()
    with pytest.raises(UserError, match='set holds no calibration set'):
        run(main, '--held-out', 'set', '--checkpoints', 'there.pth')
    with pytest.raises(UserError, match='in one process'):
        run(main, '--held-out', 'set', '--checkpoints', 'there.pth', '--launcher', 'pytorch')
