# SPDX-License-Identifier: Apache-2.0
"""Sizes and batches that a config leaves open."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError
from mmzsq.pipelines import pipeline_of
from mmzsq.synthesis import CalibrationSetGenerator, stage_sizes
from mmzsq.synthesis.default_sizes import coarse_sizes, complete_sizes
from mmzsq.synthesis.stage_sizes import accepts, choose_stages, fitting_batch
from mmzsq.tasks import build_detection_task

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
SYNTHESIS = complete_section({})['synthesis']
SAMPLER = complete_section({})['label_sampler']


class Task:
    """A detector that takes images of at least ``smallest`` pixels and multiples of ``divisor``."""

    needs_masks = False
    num_classes = 2
    device = torch.device('cpu')

    def __init__(self, smallest: int = 32, divisor: int = 1) -> None:
        self.detector = SimpleNamespace(data_preprocessor=SimpleNamespace(pad_size_divisor=divisor))
        self.smallest = smallest
        self.value = 1.0
        self.tried: list[tuple[int, ...]] = []

    def data_samples(self, labels: Any, size: Any) -> Any:
        assert all((instances.bboxes < max(size)).all() for instances in labels)
        return labels

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        self.tried.append(tuple(images.shape[2:]))
        if min(images.shape[2:]) < self.smallest:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return torch.tensor(self.value)

    def predict(self, images: Tensor) -> list[Any]:
        return []


def resize(width: int, height: int, keep_ratio: bool) -> list[dict[str, Any]]:
    return [dict(type='Resize', scale=(width, height), keep_ratio=keep_ratio)]


def sizes(task: Any, pipeline: list[dict[str, Any]], **changes: Any) -> list[Any]:
    chosen, _ = choose_stages(task, {**SYNTHESIS, **changes}, SAMPLER, 32, 0, pipeline)
    stages = [chosen['relabel'], chosen['refine'], chosen['synthesize']]
    return [stage and tuple(stage['image_size']) for stage in stages]


@pytest.mark.parametrize(
    ('pipeline', 'expected'),
    [
        ([dict(type='mmzsq.LetterResize', scale=(640, 640))], [(160, 160), (320, 320), (640, 640)]),
        (resize(320, 320, False), [(160, 160), (224, 224), (320, 320)]),
        (resize(512, 512, False), [(160, 160), (288, 288), (512, 512)]),
        (resize(640, 480, False), [(160, 224), (288, 384), (480, 640)]),
        # As many pixels as images of the pipeline have, up to 640 x 640.
        (resize(1333, 800, True), [(160, 160), (320, 320), (640, 640)]),
        (resize(640, 480, True), [(160, 160), (288, 288), (544, 544)]),
        (resize(608, 608, True), [(160, 160), (320, 320), (608, 608)]),
        ([], [(160, 160), (320, 320), (640, 640)]),
        (resize(96, 96, False), [(96, 96)] * 3),
        (resize(1280, 1280, False), [(320, 320), (640, 640), (1280, 1280)]),
    ],
)
def test_sizes_follow_the_test_pipeline(pipeline: list[dict[str, Any]], expected: list[Any]) -> None:
    assert sizes(Task(), pipeline) == expected


def test_the_coarse_size_grows_until_the_detector_takes_it() -> None:
    task = Task(smallest=250)
    assert sizes(task, resize(512, 512, False)) == [(256, 256), (352, 352), (512, 512)]
    assert task.tried == [(160, 160), (192, 192), (224, 224), (256, 256), (352, 352)]
    # Nothing but the full size.
    assert sizes(Task(smallest=500), resize(512, 512, False)) == [(512, 512)] * 3
    assert sizes(Task(smallest=300, divisor=128), resize(512, 512, False)) == [(384, 384), (448, 448), (512, 512)]


def test_what_the_config_sets_stays() -> None:
    task = Task(smallest=1000)
    stages = dict(
        relabel=dict(image_size=128, iterations=1),
        refine=None,
        synthesize=dict(image_size=(96, 256), iterations=1),
    )
    chosen, lines = choose_stages(task, {**SYNTHESIS, **stages}, SAMPLER, 32, 0, resize(320, 320, False))
    assert {key: chosen[key] for key in stages} == stages
    assert task.tried == []
    assert lines == [
        'stage relabel: 128x128 px (as set), 1 iterations, batches of 32',
        'stage synthesize: 96x256 px (as set), 1 iterations, batches of 32',
    ]


def test_the_log_says_what_was_chosen_and_why() -> None:
    _, lines = choose_stages(Task(250), SYNTHESIS, SAMPLER, 32, 0, resize(1333, 800, True))
    assert lines == [
        'stage relabel: 256x256 px (the smallest size that the detector takes), 800 iterations, batches of 128',
        'stage refine: 416x416 px (between both), 300 iterations, batches of 64',
        'stage synthesize: 640x640 px (for speed; the test pipeline (1333x800, keeps the aspect ratio) makes larger '
        'images), 400 iterations, batches of 64',
    ]


def test_a_loss_that_is_not_finite_counts_as_refused_and_a_missing_package_does_not() -> None:
    task = Task()
    assert accepts(task, (64, 64))
    task.value = float('nan')
    assert not accepts(task, (64, 64))

    def missing(images: Tensor, samples: Any) -> Tensor:
        raise UserError('needs another package')

    task.loss = missing  # type: ignore[method-assign]
    with pytest.raises(UserError, match='another package'):
        accepts(task, (64, 64))


def test_a_trial_leaves_the_random_generators_alone() -> None:
    state = torch.get_rng_state()
    sizes(Task(), [])
    assert torch.equal(torch.get_rng_state(), state)


def test_several_refine_stages_lie_between_in_equal_ratios() -> None:
    refine = [dict(image_size=None, iterations=1), dict(image_size=None, iterations=1)]
    made = complete_sizes({**SYNTHESIS, 'refine': refine}, (1280, 1280), (160, 160))
    assert [stage['image_size'] for stage in made['refine']] == [[320, 320], [640, 640]]
    assert refine[0]['image_size'] is None


def test_candidates_of_the_coarse_size_end_at_the_full_size() -> None:
    assert list(coarse_sizes((200, 400))) == [(160, 320), (192, 384), (200, 400)]
    assert list(coarse_sizes((1280, 1280)))[0] == (320, 320)
    assert list(coarse_sizes((96, 128))) == [(96, 128)]


def test_a_batch_is_halved_until_a_step_fits() -> None:
    tried = []

    def step(count: int) -> None:
        tried.append(count)
        if count > 20:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    assert fitting_batch(128, step) == 16
    assert tried == [128, 64, 32, 16]

    def never(count: int) -> None:
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    assert fitting_batch(8, never) == 1


def test_batches_are_fitted_on_a_gpu_if_the_config_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes that were chosen, and for each stage alone."""
    steps = []

    def step(generator: Any, size: tuple[int, int], count: int) -> None:
        steps.append((size, count))
        if count * size[0] * size[1] > 16 * 640 * 640:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    class Generator:
        def __init__(self, task: Any, synthesis: Any, *args: Any) -> None:
            self.stages = [
                SimpleNamespace(name=name, image_size=tuple(synthesis[name]['image_size']), batch_size=batch)
                for name, batch in (('relabel', 128), ('refine', 64), ('synthesize', 64))
            ]

    monkeypatch.setattr(stage_sizes, 'CalibrationSetGenerator', Generator)
    monkeypatch.setattr(stage_sizes, '_trial_step', step)
    monkeypatch.setattr(stage_sizes, 'accepts', lambda task, size: True)
    task: Any = Task()
    task.device = torch.device('cuda')
    chosen, lines = choose_stages(task, SYNTHESIS, SAMPLER, 32, 0, [])
    assert [chosen[name]['batch_size'] for name in ('relabel', 'refine', 'synthesize')] == [128, 64, 16]
    assert steps == [((160, 160), 128), ((320, 320), 64), *(((640, 640), count) for count in (64, 32, 16))]
    assert lines[-1].endswith('400 iterations, batches of 16')
    steps.clear()
    chosen, _ = choose_stages(task, {**SYNTHESIS, 'fit_batches': False}, SAMPLER, 32, 0, [])
    assert chosen['synthesize']['batch_size'] == 64 and steps == []


def test_the_choices_of_an_existing_set_are_kept() -> None:
    """Another machine would choose other sizes and batches, but must continue the same set."""
    first, _ = choose_stages(Task(250), SYNTHESIS, SAMPLER, 32, 0, [])
    first['synthesize']['batch_size'] = 16
    known = json.loads(json.dumps(first))
    task = Task(32)
    again, lines = choose_stages(task, SYNTHESIS, SAMPLER, 32, 0, [], known)
    assert json.loads(json.dumps(again)) == known
    assert task.tried == []
    assert lines[0] == 'stage relabel: 256x256 px (as in the set), 800 iterations, batches of 128'
    # What the config sets, the size of the test pipeline, and a batch that is no halving are not taken over.
    wider = {**SYNTHESIS, 'relabel': dict(SYNTHESIS['relabel'], image_size=192)}
    other, _ = choose_stages(task, wider, SAMPLER, 32, 0, resize(512, 512, False), known)
    assert other['relabel']['image_size'] == 192
    assert other['synthesize']['image_size'] == [512, 512]
    known['synthesize']['batch_size'] = 48
    other, _ = choose_stages(task, SYNTHESIS, SAMPLER, 32, 0, [], known)
    assert other['synthesize']['batch_size'] == 64


def test_ssd512_of_mmdetection_gets_stages_that_it_takes() -> None:
    """Its head has no pixels left at 160 px."""
    register_all_modules()
    cfg = Config.fromfile(CONFIGS / 'ssd/ssd512_coco.py')
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model)
    # SSD's normalization has no values before.
    detector.init_weights()
    task = build_detection_task(detector)
    synthesis = complete_section(dict(synthesis=dict(require_feature_prior=False)))['synthesis']
    chosen, _ = choose_stages(task, synthesis, SAMPLER, 32, 0, pipeline_of(cfg))
    [coarse, fine, full] = (chosen[name]['image_size'] for name in ('relabel', 'refine', 'synthesize'))
    assert full == [512, 512] and 160 < coarse[0] < fine[0] < 512
    assert not accepts(task, (coarse[0] - 32, coarse[1] - 32))
    stages = dict(
        relabel=dict(chosen['relabel'], iterations=1),
        refine=None,
        synthesize=dict(chosen['synthesize'], iterations=0),
    )
    for stage in (stages['relabel'], stages['synthesize']):
        stage['batch_size'] = 1
    images, _, info = CalibrationSetGenerator(task, {**chosen, **stages}, SAMPLER, 1, 0).make_shard(0, 1)
    assert info['relabel']['image_size'] == coarse and images.shape == (1, 512, 512, 3)
