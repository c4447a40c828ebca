# SPDX-License-Identifier: Apache-2.0
"""The dry run: what it measures, extrapolates and leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from mmzsq.engine import forecast as module
from mmzsq.engine.forecast import StepCost, cost_lines, forecast
from mmzsq.errors import UserError

SCHEDULE = {
    'zsq.synthesis.relabel': dict(image_size=64, iterations=6, batch_size=4),
    'zsq.synthesis.refine': None,
    'zsq.synthesis.synthesize': dict(image_size=96, iterations=4, batch_size=2, start='previous', lr=0.05),
    'zsq.label_sampler.warmup': 2,
    'zsq.label_sampler.interval': 2,
    'zsq.calibration_set.num_images': 100,
    # Without the search for initial steps.
    'zsq.quantizer.weight.init': 'lsq',
    'zsq.quantizer.activation.init': 'lsq',
    'zsq.quantizer.equalize': False,
}


def test_a_forecast_says_what_to_expect_and_leaves_no_set(make_runner: Any) -> None:
    made = forecast(make_runner(**SCHEDULE))
    assert made.share == 1.0
    assert made.health.images == 8 and made.health.labels is not None and made.health.batch_norm is not None
    relabel, synthesize, train = made.costs
    assert [(cost.name, cost.image_size, cost.batch_size) for cost in made.costs] == [
        ('relabel', (64, 64), 4),
        ('synthesize', (96, 96), 2),
        ('train', (96, 96), 2),
    ]
    for cost, steps in ((relabel, 6), (synthesize, 4)):
        assert cost.seconds == pytest.approx(cost.ms_per_image_iteration * steps * 100 / 1000)
    # Two epochs of 100 images.
    assert train.steps == 100
    assert train.seconds == pytest.approx(train.ms_per_image_iteration * 200 / 1000)
    assert all(cost.ms_per_image_iteration > 0 and cost.peak_mb > 50 for cost in made.costs)
    files = {str(path) for path in Path('out').rglob('*') if path.is_file() and path.suffix in ('.png', '.json')}
    assert {name for name in files if 'vis_data' not in name} == {
        'out/dry_run/gallery.png',
        'out/dry_run/forecast.json',
    }
    assert cv2.imread('out/dry_run/gallery.png') is not None
    assert json.loads(Path('out/dry_run/forecast.json').read_text())['num_images'] == 100
    [log] = Path('out').glob('*/*.log')
    text = log.read_text()
    assert 'dry run: 8 images by the whole schedule' in text and 'whole run: 100 images and training in about' in text


@pytest.mark.parametrize(('hours', 'gpu', 'named'), [(7, False, True), (5, False, False), (7, True, False)])
def test_shorter_runs_are_named_if_a_cpu_takes_hours(
    hours: int, gpu: bool, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    cost = StepCost('synthesize', (640, 640), 64, 2500, 100.0, hours * 3600.0, 900.0, captured=False)
    assert ('zsq.preset=instant takes minutes' in cost_lines([cost], 2000)[-1]) is named


def test_a_long_schedule_is_shortened_with_all_stages_and_says_so(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, 'BUDGET_SECONDS', 1e-6)
    runner = make_runner(**SCHEDULE)
    made = forecast(runner)
    assert 0 < made.share < 0.01
    assert '% of the iterations of the schedule' in made.summary()
    # The costs are those of the whole schedule.
    assert [cost.steps for cost in made.costs[:2]] == [6, 4]


def test_shortening_keeps_the_pace_of_relabeling() -> None:
    synthesis = dict(
        relabel=dict(image_size=64, iterations=800, batch_size=128),
        refine=None,
        synthesize=dict(image_size=96, iterations=400, batch_size=64),
    )
    short, sampler = module._shortened(
        synthesis, dict(type='mmzsq.AdaptiveLabelSampler', warmup=300, interval=100), 0.1
    )
    assert (short['relabel']['iterations'], short['synthesize']['iterations']) == (80, 40)
    assert (short['relabel']['batch_size'], short['synthesize']['batch_size']) == (8, 8)
    assert (sampler['warmup'], sampler['interval']) == (30, 10)
    whole, unchanged = module._shortened(synthesis, dict(warmup=300), 1.0)
    assert whole['relabel']['iterations'] == 800 and unchanged == dict(warmup=300)
    assert synthesis['relabel']['batch_size'] == 128


def test_training_images_are_those_that_opencv_would_read(make_config: Any) -> None:
    image = torch.zeros(2, 8, 16, 3, dtype=torch.uint8).numpy()
    image[..., 0] = 200
    zsq = make_config().zsq
    zsq.train = dict(image_size=(16, 16))
    zsq.distillation = dict(detection_weight=1.0)
    box = module.InstanceData(bboxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]), labels=torch.tensor([1]))
    batch = module._training_batch(image, [box, box], zsq)
    assert batch['inputs'].shape == (2, 3, 16, 16)
    # Red is the last channel of BGR.
    assert batch['inputs'][0, :, 0, 0].tolist() == [0, 0, 200]
    assert batch['data_samples'][1].gt_instances.bboxes.tolist() == [[0.0, 0.0, 8.0, 16.0]]


def test_a_run_on_real_images_has_no_dry_run(make_runner: Any) -> None:
    runner = make_runner(**{'zsq.calibration_set.real': dict(type='CocoDataset', ann_file='a.json', data_root='')})
    with pytest.raises(UserError, match=r'--dry-run makes synthetic images: remove zsq\.calibration_set\.real'):
        forecast(runner)
