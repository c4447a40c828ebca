# SPDX-License-Identifier: Apache-2.0
"""An evaluation that fails is announced before the run if its files can tell, and never loses results."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from mmzsq import cli, train
from mmzsq import test as test_tool
from mmzsq.datasets.shapes_drawing import CLASS_NAMES
from mmzsq.engine import ZeroShotRunner, shared_errors
from mmzsq.engine.evaluation import build_evaluation, check_evaluation, evaluate
from mmzsq.errors import UserError

PICTURES = {'zsq.calibration_set.source': 'procedural', 'zsq.train.max_epochs': 0}
"""A run of seconds: drawn pictures, and no training."""


@METRICS.register_module(force=True)
class BrokenMetric(BaseMetric):
    """Fails when all results are there, as COCO's does without masks."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples

    def compute_metrics(self, results: Any) -> dict[str, float]:
        raise IndexError


def write_data(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda coco: None) -> dict[str, Any]:
    """Write two images with annotations in COCO's format, and return the options that evaluate on them."""
    folder.mkdir(parents=True)
    for index in range(2):
        cv2.imwrite(str(folder / f'{index}.png'), np.full((64, 64, 3), 90 * index, np.uint8))
    box = dict(category_id=1, bbox=[8, 8, 20, 20], area=400, iscrowd=0)
    coco = dict(
        images=[dict(id=index, file_name=f'{index}.png', width=64, height=64) for index in range(2)],
        annotations=[dict(box, id=index + 1, image_id=index) for index in range(2)],
        categories=[dict(id=index, name=name) for index, name in enumerate(CLASS_NAMES, 1)],
    )
    changed = change(coco)
    (folder / 'annotations.json').write_text(changed if isinstance(changed, str) else json.dumps(changed or coco))
    return options(folder)


def options(folder: Path, **evaluator: Any) -> dict[str, Any]:
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='mmdet.LoadAnnotations', with_bbox=True),
        dict(type='mmdet.Resize', scale=(64, 64)),
        dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
    dataset = dict(
        type='mmdet.CocoDataset',
        data_root=str(folder),
        ann_file='annotations.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=CLASS_NAMES),
        test_mode=True,
        pipeline=pipeline,
    )
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    metric = dict(type='mmdet.CocoMetric', metric='bbox', ann_file=str(folder / 'annotations.json'))
    return {
        **{f'{name}_dataloader': dict(_delete_=True, **loader) for name in ('val', 'test')},
        **{f'{name}_evaluator': dict(_delete_=True, **{**metric, **evaluator}) for name in ('val', 'test')},
    }


def results(work_dir: str = 'out') -> dict[str, Any]:
    return json.loads(Path(work_dir, 'results.json').read_text())


@pytest.fixture
def call(make_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a tool, and return its exit code and what it wrote to standard error."""

    def call(tool: Any, cfg: Config, *args: str) -> tuple[int, str]:
        monkeypatch.setattr(cli, 'load_config', lambda args: cfg)
        monkeypatch.setattr('sys.argv', ['tool', 'config.py', *args])
        code = 0
        try:
            cli.run(tool.main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capsys.readouterr().err

    return call


def empty(coco: dict[str, Any]) -> dict[str, Any]:
    return dict(coco, images=[], annotations=[])


DAMAGE = {
    'text': (lambda coco: 'annotations', 'JSONDecodeError'),
    'cut off': (lambda coco: json.dumps(coco)[:-20], 'JSONDecodeError'),
    'list': (lambda coco: '[]', 'list of categories'),
    'no categories': (lambda coco: [coco.pop('categories'), None][1], 'categories'),
    'no images': (empty, 'the data set has no images'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_annotations_that_cannot_be_used_are_named_before_the_run(make_runner: Any, tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    runner = make_runner('out', **write_data(tmp_path / 'data', change))
    with pytest.raises(UserError, match=r'cannot be (used|read).*: .*val_dataloader=None') as caught:
        runner.train()
    assert message in str(caught.value)
    assert not list(Path('out').glob('calibration_set/images/*'))


def test_a_missing_package_is_named_before_the_run(make_runner: Any, tmp_path: Path, monkeypatch: Any) -> None:
    data = write_data(tmp_path / 'data')
    monkeypatch.setitem(__import__('sys').modules, 'lvis', None)
    monkeypatch.setattr('mmdet.evaluation.metrics.lvis_metric.lvis', None)
    data['val_evaluator'] = dict(
        _delete_=True, type='mmdet.LVISMetric', ann_file=str(tmp_path / 'data/annotations.json')
    )
    with pytest.raises(UserError, match='RuntimeError: .*lvis'):
        check_evaluation(make_runner('out', **data))
    # Without the data, nobody needs the package.
    data['val_evaluator']['ann_file'] = str(tmp_path / 'nowhere.json')
    assert check_evaluation(make_runner('other', **data)) == str(tmp_path / 'nowhere.json')


def test_absent_data_are_found_without_building_anything(make_runner: Any, tmp_path: Path) -> None:
    # A data set within wrappers, of a type that is not installed, whose images or annotations are not here.
    (tmp_path / 'here').mkdir()
    inner = dict(type='NotInstalled', data_root=str(tmp_path / 'here'), ann_file='', data_prefix=dict(img='nowhere/'))
    wrapped = dict(type='RepeatDataset', times=1, dataset=dict(type='ConcatDataset', datasets=[inner]))
    data = options(tmp_path / 'here')
    data['val_dataloader']['dataset'] = wrapped
    assert check_evaluation(make_runner('out', **data)) == f'{tmp_path}/here/nowhere/'
    inner.update(data_prefix=dict(img=''), ann_file='missing.json')
    assert check_evaluation(make_runner('other', **data)) == str(tmp_path / 'here' / 'missing.json')


def test_the_check_reads_no_image_and_leaves_the_random_state(
    make_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner('out', **write_data(tmp_path / 'data'))
    monkeypatch.setattr(cv2, 'imdecode', lambda *args: pytest.fail('an image is read'))
    build = runner.build_evaluator
    drawn = lambda cfg: [build(cfg), random.random(), np.random.rand(), torch.rand(1)]  # noqa: E731
    monkeypatch.setattr(runner, 'build_evaluator', drawn)
    states = []
    for check in (lambda runner: None, check_evaluation):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        assert check(runner) is None
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


def damage_image(folder: Path) -> None:
    content = (folder / '1.png').read_bytes()
    (folder / '1.png').write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (damage_image, '1.png'),
        (lambda folder: (folder / '1.png').unlink(), '1.png'),
    ],
)
def test_an_image_that_cannot_be_read_keeps_all_other_results(
    make_config: Any, call: Any, tmp_path: Path, damage: Any, message: str
) -> None:
    data = write_data(tmp_path / 'data')
    damage(tmp_path / 'data')
    code, error = call(train, make_config('out', **data, **PICTURES))
    assert code == 3
    assert error.startswith('error: the student is trained, but its evaluation failed') and error.count('\n') == 1
    assert message in error
    written = results()
    assert (written['metrics'], written['evaluation_images']) == ({}, 2)
    assert message in written['not_evaluated']
    assert written['model_mb']['quantized'] < written['model_mb']['float'] / 4
    assert written['settings']['train']['max_epochs'] == 0
    assert written['calibration_set']['statistics']['images'] == 3
    student = torch.load(Path('out', written['checkpoint']), weights_only=True)
    assert student['state_dict']
    # The traceback is in the log file only.
    assert 'Traceback' not in error
    assert 'Traceback' in next(Path('out').glob('*/*.log')).read_text()
    # The evaluation alone fails the same way.
    code, error = call(test_tool, make_config('out', **data, **PICTURES), str(Path('out', written['checkpoint'])))
    assert code == 2
    assert error.startswith('error: the evaluation failed') and message in error and error.count('\n') == 1


def test_rows_that_were_measured_are_kept(make_config: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmzsq.engine import report

    rows: list[dict[str, float]] = []

    def fail_second(runner: Any, title: str) -> dict[str, float]:
        if rows:
            raise MemoryError
        rows.append(evaluate(runner))
        return rows[0]

    monkeypatch.setattr(report, 'evaluate', fail_second)
    code, error = call(train, make_config('out', **PICTURES))
    assert code == 3
    assert 'MemoryError' in error
    # NaN where a class has no object.
    np.testing.assert_equal(results()['metrics'], dict(float=rows[0]))
    assert results()['not_evaluated'] == 'MemoryError'
    assert 'evaluate_float' in results()['seconds']


def test_ctrl_c_in_the_evaluation_leaves_the_results(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmzsq.engine import report

    def interrupt(runner: Any, title: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, 'evaluate', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_runner('out', **PICTURES).train()
    assert results()['not_evaluated'] == 'KeyboardInterrupt'


def test_data_that_go_missing_during_the_run_are_an_error(
    make_config: Any, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = ZeroShotRunner.generate
    monkeypatch.setattr(
        ZeroShotRunner, 'generate', lambda self: [generate(self), (tmp_path / 'data/annotations.json').unlink()]
    )
    code, error = call(train, make_config('out', **write_data(tmp_path / 'data'), **PICTURES))
    assert code == 3
    assert 'annotations.json' in error


def test_absent_data_are_said_and_no_error(make_config: Any, call: Any, tmp_path: Path, caplog: Any) -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger, 'warning', lambda self, text, *args: said.append(text))
        assert call(train, make_config('out', **options(tmp_path / 'nowhere'), **PICTURES)) == (0, '')
    assert [text for text in said if 'accuracy will not be measured' in text and 'nowhere' in text]
    assert 'nowhere' in results()['not_evaluated']


@pytest.mark.parametrize('own', [True, False])
def test_a_metric_that_fails_in_rank_0_fails_everywhere(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Rank 0 computes metrics and sends them to the others, which must not take the failure for a number."""
    runner = make_runner('out', val_evaluator=dict(_delete_=True, type='BrokenMetric', prefix='broken'))
    if not own:
        # What rank 0 sends.
        monkeypatch.setattr(BrokenMetric, 'compute_metrics', lambda self, results: {'__failed__0': 'IndexError'})
    build_evaluation(runner)
    runner.detector.load_teacher()
    with pytest.raises(IndexError if own else UserError), runner.detector.predict_with_teacher():
        evaluate(runner)


@pytest.mark.parametrize('own', [True, False])
def test_an_unreadable_image_in_one_process_fails_the_evaluation_in_all(
    make_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Either another process fails, or this one fails and the other is notified."""
    told: list[Any] = []

    def gather(error: Any, group: Any) -> list[Any]:
        told.append(error)
        return [error, UserError('2.png is damaged') if not own and len(told) == 2 else None]

    data = write_data(tmp_path / 'data')
    runner = make_runner('out', **data)
    if own:
        (tmp_path / 'data' / '1.png').unlink()
    monkeypatch.setattr(shared_errors, '_gather', gather)
    build_evaluation(runner)
    expected = pytest.raises(FileNotFoundError, match='1.png') if own else pytest.raises(UserError, match='2.png is')
    runner.detector.load_teacher()
    with expected, runner.detector.predict_with_teacher():
        evaluate(runner)
    assert len(told) == 2
    assert told[0] is None
    assert (told[1] is not None) == own
