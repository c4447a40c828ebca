# SPDX-License-Identifier: Apache-2.0
"""Each command refuses names and weights that do not belong to its config: exit code 2, one message, no traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from quantized_detectors import scenes
from safetensors.torch import load_file

from mmzsq import cli, predict, test, train
from mmzsq.checkpoint import file_sha256
from mmzsq.config import compose
from mmzsq.datasets.shapes_drawing import CLASS_NAMES, draw_scene
from mmzsq.quantization import calibrating
from mmzsq.registry import MODELS

IMAGES = 3
FLOAT = 'shapes/yolov5-p_shapes.py'
QUANTIZED = 'zsq/yolov5-p_shapes_w4a4.py'
COMMANDS = dict(test=test, train=train, predict=predict)
TEACHER = 'mmzsq://yolov5-p_shapes.safetensors'

Run = Callable[..., tuple[int, str]]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope='module')
def folder(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with scenes in COCO format (good.json), a student (student.pth) and its teacher (float.pth)."""
    register_all_modules()
    folder = tmp_path_factory.mktemp('doors')
    coco: dict[str, Any] = dict(images=[], annotations=[])
    coco['categories'] = [dict(id=index + 1, name=name) for index, name in enumerate(CLASS_NAMES)]
    for index in range(IMAGES):
        scene = draw_scene(1, index)
        height, width = scene.image.shape[:2]
        cv2.imwrite(str(folder / f'{index}.png'), scene.image)
        coco['images'].append(dict(id=index, file_name=f'{index}.png', width=width, height=height))
        for (x1, y1, x2, y2), label in zip(scene.bboxes.tolist(), scene.labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = dict(id=len(coco['annotations']) + 1, image_id=index, category_id=label + 1, iscrowd=0)
            coco['annotations'].append(dict(entry, bbox=box, area=box[2] * box[3]))
    (folder / 'good.json').write_text(json.dumps(coco))
    (folder / 'reversed.json').write_text(json.dumps(dict(coco, categories=coco['categories'][::-1])))
    (folder / 'lacking.json').write_text(json.dumps(dict(coco, categories=coco['categories'][:-1])))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='mmdet.Resize', scale=(256, 256), keep_ratio=True),
        dict(type='mmdet.LoadAnnotations', with_bbox=True),
        dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
    ]
    for name, base in (('float.py', FLOAT), ('quantized.py', QUANTIZED)):
        loader = dict(
            batch_size=3,
            num_workers=0,
            persistent_workers=False,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CocoDataset',
                ann_file=str(folder / 'good.json'),
                data_prefix=dict(img=str(folder)),
                metainfo=dict(classes=CLASS_NAMES),
                test_mode=True,
                pipeline=pipeline,
            ),
            _delete_=True,
        )
        evaluator = dict(type='CocoMetric', ann_file=str(folder / 'good.json'), metric='bbox', _delete_=True)
        (folder / name).write_text(
            f"_base_ = '{repo}/configs/{base}'\nval_dataloader = test_dataloader = {loader!r}\n"
            f'val_evaluator = test_evaluator = {evaluator!r}\n'
        )
    weights = load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors')
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=dict(classes=CLASS_NAMES))), folder / 'float.pth')
    detector = MODELS.build(compose(Config.fromfile(folder / 'quantized.py')).model).eval()
    detector.student.load_state_dict(weights, strict=False)
    with torch.no_grad(), calibrating(detector.student):
        detector.student(scenes())
    meta = dict(
        mmzsq=dict(quantizer=json.loads(json.dumps(detector.quantizer_cfg)), teacher='the/teacher.pth'),
        dataset_meta=dict(classes=CLASS_NAMES),
    )
    torch.save(dict(state_dict=detector.state_dict(), meta=meta), folder / 'student.pth')
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; returns its exit code, and what it wrote to standard error or, on success, its metrics."""
    monkeypatch.chdir(tmp_path)
    # MMEngine formats a config by yapf six times a run, a second each.
    monkeypatch.setattr(Config, 'pretty_text', property(lambda cfg: repr(cfg.to_dict())))

    def run(command: str, config: str, checkpoint: str | None, *options: str) -> tuple[int, str]:
        where = [] if checkpoint is None else [str(folder / checkpoint) if '://' not in checkpoint else checkpoint]
        if command == 'predict':
            arguments = [*where, str(folder / '0.png'), '--out', 'out', '--config', str(folder / config)]
        else:
            arguments = [str(folder / config), *where, '--work-dir', 'work']
        monkeypatch.setattr(sys, 'argv', [command, *arguments, *options])
        capsys.readouterr()
        try:
            cli.run(COMMANDS[command].main)
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        # In the order of the runs.
        logs = sorted(Path('work').glob('*/*.log'), key=lambda path: path.stat().st_mtime_ns)
        return 0, ''.join(path.read_text() for path in logs)

    return run


def change(folder: Path, source: str, target: str, edit: Callable[[Weights], Weights]) -> str:
    loaded = torch.load(folder / source, weights_only=True)
    torch.save(dict(loaded, state_dict=edit(loaded['state_dict'])), folder / target)
    return target


def assert_refused(result: tuple[int, str], *parts: str) -> None:
    code, message = result
    assert code == 2, message
    error = message[message.index('error: ') :]
    assert error.count('\n') == 1, error
    for part in parts:
        assert part in error, error


def ap(result: tuple[int, str]) -> float:
    code, log = result
    assert code == 0, log
    return float(log.split('coco/bbox_mAP: ')[-1].split()[0])


def test_annotations_in_another_order_are_refused_and_the_right_order_has_the_right_ap(run: Run, folder: Path) -> None:
    right = ap(run('test', 'float.py', 'float.pth'))
    assert right > 0.4
    for key in ('test_dataloader.dataset.ann_file', 'test_evaluator.ann_file'):
        result = run('test', 'float.py', 'float.pth', '--cfg-options', f'{key}={folder / "reversed.json"}')
        assert_refused(result, "class 0 is 'disc'", "'stripes' in categories of", 'reversed.json', 'order')
    # The same file with a config of its order, of a detector of that order.
    names = f'test_dataloader.dataset.metainfo.classes={",".join(CLASS_NAMES[::-1])}'
    file = f'test_dataloader.dataset.ann_file={folder / "reversed.json"}'
    assert_refused(run('test', 'float.py', 'float.pth', '--cfg-options', names, file), 'val', 'disc')


@pytest.mark.parametrize('key', ['val_dataloader.dataset.ann_file', 'val_evaluator.ann_file'])
def test_training_refuses_a_file_without_a_class_before_it_makes_a_set(run: Run, folder: Path, key: str) -> None:
    options = ('--cfg-options', f'{key}={folder / "lacking.json"}', f'load_from={folder / "float.pth"}')
    result = run('train', 'quantized.py', None, *options)
    assert_refused(result, 'class 7 of the config (val_', "'stripes', is not in", 'lacking.json')
    assert not Path('work/calibration_set').exists()


def test_a_student_is_no_teacher(run: Run, folder: Path) -> None:
    result = run('train', 'quantized.py', None, '--cfg-options', f'load_from={folder / "student.pth"}')
    assert_refused(result, 'student.pth is the checkpoint of a quantized student', 'the/teacher.pth')
    assert_refused(run('test', 'float.py', 'student.pth'), 'quantized student')


def test_the_sha256_of_the_teacher_is_that_of_its_file(run: Run, folder: Path) -> None:
    for wrong in ('f' * 64, 'short'):
        result = run(
            *('train', 'quantized.py', None, '--cfg-options', f'load_from={folder / "float.pth"}'),
            f'zsq.teacher_sha256="{wrong}"',
        )
        found = file_sha256(str(folder / 'float.pth'))
        assert_refused(result, 'zsq.teacher_sha256', *(() if wrong == 'short' else (found,)))


@pytest.mark.parametrize('command', ['test', 'predict'])
@pytest.mark.parametrize(('config', 'source'), [('float.py', 'float.pth'), ('quantized.py', 'student.pth')])
def test_weights_that_do_not_belong_to_the_config_are_refused(
    run: Run, folder: Path, command: str, config: str, source: str
) -> None:
    def without_head(state: Weights) -> Weights:
        return {name: value for name, value in state.items() if not name.startswith('bbox_head.convs')}

    def with_more(state: Weights) -> Weights:
        return dict(state, **{'extra_neck.weight': torch.ones(1)})

    lacking = change(folder, source, 'lacking.pth', without_head)
    assert_refused(run(command, config, lacking), 'lacking.pth', 'weights are missing (bbox_head.convs.0.weight')
    more = change(folder, source, 'more.pth', with_more)
    assert_refused(run(command, config, more), '1 weights are left over (extra_neck.weight)')
    options = ('--cfg-options', 'model.bbox_head.num_classes=5')
    assert_refused(run(command, config, source, *options), '')


def test_prefixes_are_removed_in_an_evaluation(run: Run, folder: Path) -> None:
    def wrapped(state: Weights) -> Weights:
        return {f'model.{name}': value for name, value in state.items()}

    for config, source in (('float.py', 'float.pth'), ('quantized.py', 'student.pth')):
        expected = ap(run('test', config, source))
        assert expected > 0.1
        assert ap(run('test', config, change(folder, source, 'wrapped.pth', wrapped))) == expected


def test_names_of_the_checkpoint_must_be_those_of_the_config(run: Run, folder: Path) -> None:
    for config, source in (('float.py', 'float.pth'), ('quantized.py', 'student.pth')):
        loaded = torch.load(folder / source, weights_only=True)
        loaded['meta']['dataset_meta'] = dict(classes=CLASS_NAMES[::-1])
        torch.save(loaded, folder / 'renamed.pth')
        for command in ('test', 'predict'):
            assert_refused(run(command, config, 'renamed.pth'), "class 0 is 'disc' in the config and 'stripes' in")
    options = ('--cfg-options', f'load_from={folder / "renamed.pth"}')
    assert_refused(run('train', 'quantized.py', None, *options), 'quantized student')


@pytest.mark.parametrize(
    'content', [[1, 2], None, 'text', {'state_dict': None}, {'state_dict': [1]}, {'meta': 3, 'state_dict': {}}, {1: 2}]
)
def test_other_contents_are_refused(run: Run, folder: Path, content: Any) -> None:
    torch.save(content, folder / 'odd.pth')
    for command, config in (('test', 'float.py'), ('test', 'quantized.py'), ('predict', 'float.py')):
        assert_refused(run(command, config, 'odd.pth'), 'odd.pth')
    assert_refused(run('train', 'quantized.py', None, '--cfg-options', f'load_from={folder / "odd.pth"}'), 'odd.pth')
