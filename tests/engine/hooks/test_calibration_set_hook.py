# SPDX-License-Identifier: Apache-2.0
"""The calibration set hook: labels of real images, class names, and sets of noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmzsq.datasets.shapes_drawing import CLASS_NAMES
from mmzsq.engine.hooks import calibration_set_hook
from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet, stage_sizes


@pytest.fixture
def real_labels(tmp_path: Path) -> dict[str, Any]:
    """Sampler of labels of one real image, with an object of each of the eight shapes."""
    content = dict(
        categories=[dict(id=index, name=name) for index, name in enumerate(CLASS_NAMES)],
        images=[dict(id=0, height=100, width=200)],
        annotations=[
            dict(image_id=0, category_id=index, bbox=[20.0 * index, 10.0 * index, 40.0, 25.0]) for index in range(8)
        ],
    )
    path = tmp_path / 'real.json'
    path.write_text(json.dumps(content))
    return dict(type='mmzsq.RealLabelSampler', ann_file=str(path))


@pytest.mark.parametrize('alone', [True, False])
def test_log_and_manifest_state_that_real_labels_were_used(
    make_runner: Any, real_labels: dict[str, Any], alone: bool
) -> None:
    if alone:
        runner = make_runner(**{'zsq.label_sampler': dict(real_labels, _delete_=True)})
    else:
        runner = make_runner(**{'zsq.label_sampler.start': dict(real_labels, _delete_=True)})
    runner.generate()
    made = CalibrationSet.load('out/calibration_set')
    assert made.manifest['uses_real_labels'] is True
    [log] = Path('out').glob('*/*.log')
    assert 'reads real labels: this calibration set is not zero-shot' in log.read_text()
    if alone:
        assert made.statistics()['boxes_per_image'] == dict(mean=8.0, min=8, max=8, histogram={'8': 3})


@pytest.mark.parametrize('alone', [True, False])
def test_real_labels_of_other_names_are_refused(make_runner: Any, real_labels: dict[str, Any], alone: bool) -> None:
    content = json.loads(Path(real_labels['ann_file']).read_text())
    # Categories are taken by ascending id, so that discs would become rings.
    content['categories'][0]['id'], content['categories'][1]['id'] = 1, 0
    Path(real_labels['ann_file']).write_text(json.dumps(content))
    key = 'zsq.label_sampler' if alone else 'zsq.label_sampler.start'
    with pytest.raises(UserError, match="class 0 is 'disc' in the detector and 'ring' in the label sampler.*classes"):
        make_runner(**{key: dict(real_labels, _delete_=True)}).generate()


def test_made_up_class_names_are_reported(make_runner: Any) -> None:
    absent = [f'{part}_{key}' for part in ('val', 'test') for key in ('dataloader', 'evaluator', 'cfg')]
    runner = make_runner(**dict.fromkeys([*absent, 'train_dataloader']))
    [hook] = [hook for hook in runner.hooks if isinstance(hook, calibration_set_hook.CalibrationSetHook)]
    assert hook.class_names(runner.detector) == [f'class_{index}' for index in range(8)]
    [log] = Path('out').glob('*/*.log')
    assert 'neither the config nor the teacher names the 8 classes' in log.read_text()
    for meta in (
        dict(CLASSES=tuple('abcdefgh')),
        dict(dataset_meta=dict(CLASSES=list('abcdefgh'))),
        dict(dataset_meta=dict(classes=tuple('abcdefgh'))),
    ):
        runner.detector.teacher_meta = meta
        assert hook.class_names(runner.detector) == list('abcdefgh')


def test_manifest_states_that_no_real_labels_were_used(make_runner: Any) -> None:
    runner = make_runner()
    runner.generate()
    assert CalibrationSet.load('out/calibration_set').manifest['uses_real_labels'] is False
    [log] = Path('out').glob('*/*.log')
    assert 'real labels' not in log.read_text()


def test_wrong_number_of_class_names_is_an_error_before_synthesis(make_runner: Any) -> None:
    """Evaluation would fail hours later."""
    runner = make_runner(**{'val_dataloader.dataset.metainfo': dict(classes=['a', 'b', 'c'])})
    with pytest.raises(UserError, match=r'3 classes \(a, b, c.*has 8: set.*metainfo=dict\(classes='):
        runner.generate()
    assert not Path('out/calibration_set').exists()


def test_a_set_of_noise_is_generated_reused_and_checked(make_runner: Any) -> None:
    """The paper's Gaussian noise (Table 5): nothing is optimized, and another set is not accepted in its place."""
    sizes = dict(image_size=64, batch_size=2)
    noise = {
        'zsq.label_sampler': dict(type='mmzsq.SingleBoxSampler', _delete_=True),
        'zsq.synthesis.relabel': None,
        'zsq.synthesis.synthesize': dict(sizes, iterations=0),
        'zsq.synthesis.init': 'normal',
    }
    make_runner(**noise).generate()
    made = CalibrationSet.load('out/calibration_set')
    made.verify()
    assert made.statistics()['boxes_per_image'] == dict(mean=1.0, min=1, max=1, histogram={'1': 3})
    assert made.fingerprint['synthesis']['synthesize']['iterations'] == 0
    assert [shard['info']['synthesize']['seconds'] > 0 for shard in made.manifest['shards']] == [True, True]
    pixels = np.stack([cv2.imread(str(path)) for path in sorted(Path('out/calibration_set/images').glob('*.png'))])
    # Half of a normal distribution is below 0, 0.1587 beyond 1; the detector takes images in [0, 1].
    assert np.mean(pixels == 0) == pytest.approx(0.5, abs=0.02)
    assert np.mean(pixels == 255) == pytest.approx(0.159, abs=0.02)
    make_runner(**noise).generate()
    logs = ''.join(log.read_text() for log in Path('out').glob('*/*.log'))
    assert logs.count('using the calibration set') == 1
    with pytest.raises(UserError, match=r'synthesis\.synthesize\.iterations: 0 there, 1 now'):
        make_runner(**{**noise, 'zsq.synthesis.synthesize': dict(sizes, iterations=1)}).generate()


def test_health_is_measured_once_and_kept_in_the_manifest(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    runner.generate()
    made = CalibrationSet.load('out/calibration_set')
    made.verify()
    health = made.manifest['health']
    assert health['images'] == 3
    assert health['batch_norm']['median'] > 0 and 'bbox_head' not in str(list(health['batch_norm']['layers'])[0])
    assert health['labels']['count'] == made.statistics()['boxes']
    [log] = Path('out').glob('*/*.log')
    assert 'image health of 3 images: BatchNorm distance' in log.read_text()

    def fail(*args: Any) -> None:
        raise AssertionError('measured again')

    monkeypatch.setattr(calibration_set_hook, 'measure', fail)
    make_runner().generate()
    assert CalibrationSet.load('out/calibration_set').manifest['health'] == health


def test_a_run_goes_on_if_health_cannot_be_measured(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError('not enough values to unpack')

    monkeypatch.setattr(calibration_set_hook, 'measure', fail)
    make_runner().generate()
    assert 'health' not in CalibrationSet.load('out/calibration_set').manifest
    [log] = Path('out').glob('*/*.log')
    assert 'the health of the images is not measured: RuntimeError: not enough values' in log.read_text()


def test_open_sizes_follow_the_pipeline_and_are_kept_with_the_set(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sizes = {
        'zsq.synthesis.relabel': dict(image_size=None, iterations=1, batch_size=2),
        'zsq.synthesis.synthesize': dict(image_size=None, iterations=0, batch_size=2),
    }
    make_runner(**open_sizes).generate()
    made = CalibrationSet.load('out/calibration_set')
    stages = made.fingerprint['synthesis']
    # Resize to 256 x 256 pixels at most.
    assert stages['synthesize']['image_size'] == [256, 256] and stages['relabel']['image_size'] == [160, 160]
    assert 'fit_batches' not in stages
    [log] = Path('out').glob('*/*.log')
    assert (
        'stage synthesize: 256x256 px (about the pixels of the test pipeline (256x256, keeps the aspect ratio))'
        in log.read_text()
    )
    # Another machine, whose memory or libraries would make another choice.
    monkeypatch.setattr(stage_sizes, 'accepts', lambda task, size: False)
    make_runner(**open_sizes).generate()
    assert CalibrationSet.load('out/calibration_set').manifest == made.manifest
    explicit = {**open_sizes, 'zsq.synthesis.relabel': dict(image_size=192, iterations=1, batch_size=2)}
    with pytest.raises(UserError, match=r'synthesis\.relabel\.image_size'):
        make_runner(**explicit).generate()
