# SPDX-License-Identifier: Apache-2.0
"""Runs on procedural pictures: sources of the set, the preset ``instant``, and pictures without a config."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmzsq import cli
from mmzsq import generate as generate_tool
from mmzsq import test as test_tool
from mmzsq.config.presets import PRESETS
from mmzsq.engine import ZeroShotRunner
from mmzsq.engine.hooks import calibration_set_hook
from mmzsq.errors import UserError
from mmzsq.quantization import quantizers
from mmzsq.synthesis import CalibrationSet
from mmzsq.synthesis.procedural import picture_seed, procedural_image

SIZE = {'zsq.synthesis.synthesize.image_size': 96}
SOURCE = 'zsq.calibration_set.source'


def images_of(folder: str) -> list[np.ndarray]:
    paths = sorted(Path(folder, 'calibration_set/images').glob('*.png'))
    return [cv2.imread(str(path))[..., ::-1] for path in paths]


def log_of(folder: str) -> str:
    return ''.join(path.read_text() for path in Path(folder).glob('*/*.log'))


def picture(index: int, seed: int = 0) -> np.ndarray:
    return procedural_image(96, 96, picture_seed(seed, index))


def test_procedural_sets_build_no_detection_loss(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError('pictures need neither a task nor a generator')

    monkeypatch.setattr(calibration_set_hook, 'build_detection_task', refuse)
    monkeypatch.setattr(calibration_set_hook, 'CalibrationSetGenerator', refuse)
    make_runner(**{SOURCE: 'procedural', 'zsq.calibration_set.seed': 3}).generate()
    for index, image in enumerate(images_of('out')):
        np.testing.assert_array_equal(image, picture(index, 3))
    made = CalibrationSet.load('out/calibration_set')
    assert made.num_images == 3 and made.statistics()['boxes'] == 0
    # Any detector makes this set.
    assert made.fingerprint == dict(source='procedural', pictures=1, seed=3, image_size=[96, 96])
    with pytest.raises(UserError, match='seed: 3 there, 4 now'):
        make_runner(**{SOURCE: 'procedural', 'zsq.calibration_set.seed': 4}).generate()


def test_the_teacher_labels_pictures_if_the_student_learns_from_labels(make_runner: Any) -> None:
    labeled = {
        SOURCE: 'procedural',
        'zsq.distillation.detection_weight': 0.1,
        'zsq.train.augmentation': None,
        'zsq.label_sampler.score_thr': 0.01,
        'zsq.train.max_epochs': 1,
        **{f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')},
    }
    runner = make_runner(**labeled)
    runner.train()
    made = CalibrationSet.load('out/calibration_set')
    assert made.statistics()['boxes'] > 0
    assert {'teacher', 'detector_config', 'score_thr'} <= set(made.fingerprint)
    np.testing.assert_array_equal(images_of('out')[1], picture(1))


def test_mixed_sets_are_half_synthesized_and_half_procedural(make_runner: Any) -> None:
    five = {'zsq.calibration_set.num_images': 5}
    make_runner('mixed', **five, **{SOURCE: 'mixed'}).generate()
    make_runner('synthesized', **{SOURCE: 'synthesized'}).generate()
    mixed, synthesized = images_of('mixed'), images_of('synthesized')
    for index in (1, 3):
        np.testing.assert_array_equal(mixed[index], picture(index))
    for own, place in ((0, 0), (2, 1)):
        # The first shard of both has two synthesized images with the same seeds.
        np.testing.assert_array_equal(mixed[own], synthesized[place])
    assert (mixed[4] != picture(4)).any()
    made = CalibrationSet.load('mixed/calibration_set')
    assert made.fingerprint['source'] == 'mixed' and 'synthesis' in made.fingerprint
    boxes = dict.fromkeys(range(5), 0)
    for annotation in json.loads((made.root / 'annotations/instances.json').read_text())['annotations']:
        boxes[annotation['image_id']] += 1
    assert boxes[1] == boxes[3] == 0


@pytest.fixture
def groupnorm(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that makes a runner of a detector with neither BatchNorm nor attention."""

    def make(folder: str, **options: Any) -> ZeroShotRunner:
        cfg = make_config(folder, **SIZE, **options)
        cfg.model = dict(
            type='RetinaNet',
            data_preprocessor=dict(type='DetDataPreprocessor', mean=[0] * 3, std=[255] * 3, pad_size_divisor=32),
            backbone=dict(
                type='ResNet',
                depth=18,
                base_channels=8,
                out_indices=(1, 2),
                norm_cfg=dict(type='GN', num_groups=2),
                norm_eval=False,
                style='pytorch',
            ),
            neck=dict(type='FPN', in_channels=[16, 32], out_channels=8, num_outs=2),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=8,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16]),
            ),
            test_cfg=dict(nms_pre=50, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
        )
        from mmdet.registry import MODELS

        torch.manual_seed(0)
        detector = MODELS.build(cfg.model.to_dict())
        torch.save(dict(state_dict=detector.state_dict()), 'groupnorm.pth')
        cfg.load_from = 'groupnorm.pth'
        return ZeroShotRunner.from_cfg(cfg)

    return make


def test_a_detector_without_a_feature_prior_uses_pictures_and_says_so(groupnorm: Any) -> None:
    groupnorm('out').generate()
    for index, image in enumerate(images_of('out')):
        np.testing.assert_array_equal(image, picture(index))
    log = log_of('out')
    assert 'WARNING' in log and 'the calibration set consists of procedural pictures' in log
    assert 'RetinaNet has no BatchNorm layers' in log
    for source in ('synthesized', 'mixed'):
        with pytest.raises(UserError, match='no feature prior'):
            groupnorm(source, **{SOURCE: source}).generate()
    # The paper's presets keep the error.
    sources = {name: preset.calibration_set.source for name, preset in PRESETS.items()}
    paper = dict.fromkeys(('paper', 'paper_transformer'), 'synthesized')
    assert sources == dict(paper, default='auto', instant='procedural', reconstruct='procedural')


def test_synthesis_can_start_from_pictures(make_runner: Any) -> None:
    """Without a step, the images are the pictures themselves."""
    still = {
        'zsq.label_sampler': dict(type='mmzsq.SingleBoxSampler', _delete_=True),
        'zsq.synthesis.relabel': None,
        'zsq.synthesis.synthesize': dict(image_size=96, batch_size=2, iterations=0, start='procedural'),
    }
    make_runner(**still).generate()
    first = images_of('out')
    again = {**still, 'zsq.calibration_set.num_images': 4}
    make_runner('again', **again).generate()
    for one, other in zip(first, images_of('again'), strict=False):
        np.testing.assert_array_equal(one, other)
    deviation = [image.std() for image in first]
    assert all(10 < value < 100 for value in deviation) and len({image.tobytes() for image in first}) == 3


def test_a_stage_that_starts_from_pictures_makes_earlier_ones_useless(make_runner: Any) -> None:
    make_runner(
        **{
            'zsq.label_sampler': dict(type='mmzsq.SingleBoxSampler', _delete_=True),
            'zsq.synthesis.synthesize': dict(image_size=96, batch_size=2, iterations=1, start='procedural'),
        }
    ).generate()
    shards = CalibrationSet.load('out/calibration_set').manifest['shards']
    assert [list(shard['info']) for shard in shards] == [['synthesize']] * 2


INSTANT = {'zsq.preset': 'instant', 'zsq.train.max_epochs': 0, 'zsq.calibration_set.num_images': 4}


def test_instant_quantizes_without_training(make_runner: Any, make_config: Any, monkeypatch: Any) -> None:
    runner = make_runner(**SIZE, **INSTANT)
    before = {name: value.clone() for name, value in runner.detector.load_teacher().state_dict().items()}
    runner.train()
    results = json.loads(Path('out/results.json').read_text())
    assert set(results['metrics']) == {'float', 'ptq'}
    assert (results['train']['iterations'], results['checkpoint']) == (0, 'epoch_0.pth')
    assert results['calibration_set']['source'] == 'procedural'
    log = log_of('out')
    assert 'PTQ, initialized on the synthetic set' in log and 'zero-shot QAT' not in log
    checkpoint = torch.load('out/epoch_0.pth', weights_only=True)
    ptq = torch.load('out/ptq.pth', weights_only=True)['state_dict']
    assert all(torch.equal(ptq[name], value) for name, value in checkpoint['state_dict'].items())
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (0, 0)
    assert all(bool(quantizer.initialized) for _, quantizer in quantizers(runner.detector.student))
    # Without training, weights are the teacher's.
    same = [torch.equal(value, before[name]) for name, value in checkpoint['state_dict'].items() if name in before]
    assert len(same) > 20
    make_config().dump('config.py')
    monkeypatch.setattr(sys, 'argv', ['test', 'config.py', 'out/epoch_0.pth', '--work-dir', 'tested'])
    cli.run(test_tool.main)


@pytest.mark.parametrize(
    ('changes', 'warned'),
    [
        ({}, False),
        ({'zsq.quantizer.w_bits': 6}, False),
        ({'zsq.quantizer.w_bits': 5}, True),
        ({'zsq.quantizer.a_bits': 4}, True),
        ({'zsq.quantizer.w_bits': 4, 'zsq.preset': 'reconstruct', 'zsq.reconstruction': dict(iterations=1)}, False),
        ({'zsq.quantizer.w_bits': 4, 'zsq.preset': 'default', 'zsq.train.max_epochs': 1}, False),
    ],
)
def test_few_bits_without_training_are_a_warning(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], warned: bool
) -> None:
    runner = make_runner(**{**SIZE, **INSTANT, 'zsq.quantizer.w_bits': 8, 'zsq.quantizer.a_bits': 8, **changes})
    monkeypatch.setattr(runner, '_check_classes', lambda: raise_(StopRun))
    with pytest.raises(StopRun):
        runner.train()
    assert ('zsq.preset=reconstruct learns the rounding' in log_of('out')) is warned


class StopRun(Exception):
    """Ends a run before its work."""


def raise_(error: type[Exception]) -> None:
    raise error


def test_a_run_without_training_resumes_to_the_same_student_and_can_be_trained(make_runner: Any) -> None:
    none = {f'val_{part}': None for part in ('dataloader', 'evaluator', 'cfg')}
    make_runner(**SIZE, **INSTANT, **none).train()
    first = torch.load('out/epoch_0.pth', weights_only=True)['state_dict']
    resumed = make_runner(**SIZE, **INSTANT, **none, resume=True, load_from=None)
    resumed.train()
    again = torch.load('out/epoch_0.pth', weights_only=True)['state_dict']
    assert all(torch.equal(again[name], value) for name, value in first.items())
    longer = {**INSTANT, 'zsq.train.max_epochs': 1}
    trained = make_runner(**SIZE, **longer, **none, resume=True, load_from=None)
    trained.train()
    assert trained.epoch == 1 and trained.iter == 2
    assert Path('out/last_checkpoint').read_text().endswith('epoch_1.pth')
    after = torch.load('out/epoch_1.pth', weights_only=True)['state_dict']
    assert any(not torch.equal(after[name], value) for name, value in first.items())


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``mmzsq.generate`` without a config."""
    monkeypatch.chdir(tmp_path)

    def draw(*args: str) -> None:
        monkeypatch.setattr(sys, 'argv', ['generate', *args, '--work-dir', 'out'])
        cli.run(generate_tool.main)

    return draw


def test_pictures_need_no_config(draw: Any) -> None:
    draw('--procedural', '3', '--size', '40', '56', '--seed', '2', '--format', 'npy', '--format-dir', 'npy')
    expected = np.stack([procedural_image(40, 56, picture_seed(2, index)) for index in range(3)])
    np.testing.assert_array_equal(np.load('npy/images.npy'), expected)
    # The set is complete: another format makes no new pictures.
    written = Path('out/calibration_set/images/000000.png').stat().st_mtime_ns
    arguments = ('--procedural', '3', '--size', '40', '56', '--seed', '2')
    draw(*arguments, '--format', 'openvino')
    inputs = np.load('out/calibration_openvino/inputs.npy')
    np.testing.assert_allclose(inputs, expected.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    mean, std = ('123.675', '116.28', '103.53'), ('58.395', '57.12', '57.375')
    draw(*arguments, '--format', 'tensorrt', '--mean', *mean, '--std', *std, '--bgr')
    inputs = np.load('out/calibration_tensorrt/inputs.npy')
    normalized = (expected[..., ::-1] - np.float32(mean)) / np.float32(std)
    np.testing.assert_allclose(inputs, normalized.transpose(0, 3, 1, 2), atol=1e-5)
    assert 'BGR, (pixel - mean) / std with mean [123.675' in Path('out/calibration_tensorrt/README.md').read_text()
    assert Path('out/calibration_set/images/000000.png').stat().st_mtime_ns == written


@pytest.mark.parametrize('name', ['coco', 'yolo'])
def test_formats_with_labels_hold_none_and_say_so(draw: Any, name: str) -> None:
    draw('--procedural', '2', '--size', '32', '--format', name)
    folder = Path(f'out/calibration_{name}')
    assert 'The images have no labels' in (folder / 'README.md').read_text()
    assert len(list((folder / 'images').iterdir())) == 2
    if name == 'coco':
        content = json.loads((folder / 'annotations/instances.json').read_text())
        assert len(content['images']) == 2 and content['annotations'] == []
    else:
        assert [path.read_text() for path in (folder / 'labels').iterdir()] == ['', '']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'give a config, or --procedural N'),
        (('--procedural', '0'), '--procedural is 0, but must be'),
        (('--procedural', '2', '--size', '32', '32', '32'), '--size is 32 32 32, but must be'),
        (('--procedural', '2', '--std', '1', '0', '1'), '--std is 1.0 0.0 1.0, but must be three positive'),
        (('--procedural', '2', '--format', 'tflite'), "unknown format 'tflite'"),
        (('--procedural', '2', '--format-dir', 'x'), 'add --format NAME'),
        (('config.py', '--procedural', '2'), '--procedural takes no config'),
        (('config.py', '--size', '32'), '--size only go with --procedural'),
    ],
)
def test_mistakes_end_with_one_message(
    draw: Any, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        draw(*arguments)
    assert error.value.code == 2
    assert message in capfd.readouterr().err
    assert not Path('out').exists()


def test_the_preset_of_the_demo_is_instant_when_asked(repo: Path) -> None:
    from mmzsq.config import compose

    cfg = Config.fromfile(repo / 'configs/zsq/yolov5-p_shapes_w4a4.py')
    cfg.merge_from_dict({'zsq.preset': 'instant'})
    composed = compose(cfg)
    assert composed.train_cfg.max_epochs == 0
    assert composed.zsq.synthesis.synthesize.image_size == 256
    assert composed.param_scheduler == []
