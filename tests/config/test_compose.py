# SPDX-License-Identifier: Apache-2.0
"""``compose``: the runnable config of a detector and a zsq section, and messages for mistakes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, TRANSFORMS

from mmzsq.config.compose import class_names, complete_section, compose, merge
from mmzsq.errors import UserError


@pytest.fixture
def user() -> Config:
    """A user's config: a detector with its training settings, and a zsq section."""
    loader = dict(batch_size=1, dataset=dict(type='CocoDataset', metainfo=dict(classes=('cat', 'dog')), ann_file='no'))
    return Config(
        dict(
            model=dict(type='YOLOX', bbox_head=dict(num_classes=2)),
            load_from='teacher.pth',
            work_dir='out',
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=10, val_begin=3),
            train_dataloader=dict(batch_size=7, batch_sampler=dict(type='AspectRatioBatchSampler'), dataset=dict()),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1, momentum=0.9)),
            param_scheduler=[dict(type='MultiStepLR', milestones=[1])],
            auto_scale_lr=dict(enable=True, base_batch_size=16),
            val_cfg=dict(type='ValLoop'),
            val_dataloader=loader,
            val_evaluator=dict(type='CocoMetric'),
            test_cfg=dict(type='TestLoop'),
            test_dataloader=loader,
            test_evaluator=dict(type='CocoMetric', metric='bbox'),
            visualizer=dict(type='DetLocalVisualizer'),
            env_cfg=dict(cudnn_benchmark=True),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=5),
                checkpoint=dict(type='CheckpointHook', interval=2, save_best='auto'),
            ),
            custom_hooks=[
                dict(type='YOLOXModeSwitchHook'),
                dict(type='mmdet.PipelineSwitchHook'),
                dict(type='EMAHook'),
                dict(type='EmptyCacheHook'),
            ],
            zsq=dict(quantizer=dict(w_bits=4)),
        )
    )


def composed(cfg: Config, **zsq: Any) -> Config:
    cfg = copy.deepcopy(cfg)
    cfg.zsq = merge(cfg.zsq.to_dict(), zsq)
    return compose(cfg)


def types(hooks: Any) -> list[str]:
    return [hook.type for hook in hooks]


# Kept and replaced settings.


def test_compose_does_not_change_its_argument_or_a_composed_config(user: Config) -> None:
    before = copy.deepcopy(user.to_dict())
    once = compose(user)
    assert user.to_dict() == before
    twice = compose(once)
    assert twice.to_dict() == once.to_dict()
    assert twice is not once


@pytest.mark.parametrize('suffix', ['.py', '.json', '.yml'])
def test_a_composed_config_survives_a_file_and_refuses_ineffective_changes(
    user: Config, tmp_path: Path, suffix: str
) -> None:
    leaf = tmp_path / 'leaf.py'
    user.dump(leaf)
    dumped = tmp_path / f'composed{suffix}'
    compose(Config.fromfile(leaf)).dump(dumped)
    read = Config.fromfile(dumped)
    assert compose(read).to_dict() == read.to_dict()
    for key, value in {
        'quantizer.w_bits': 6,
        'quantizer.overrides': {'neck': 8},
        'calibration_set.dir': '/sets/a',
        'train.amp': True,
        'quantiser.w_bits': 4,
    }.items():
        changed = copy.deepcopy(read)
        changed.merge_from_dict({f'zsq.{key}': value})
        with pytest.raises(UserError, match=f'already composed.*with the config that was composed: {leaf}'):
            compose(changed)
    # The value it has.
    read.merge_from_dict({'zsq.quantizer.w_bits': 4, 'zsq.train.amp': False})
    compose(read)


def test_a_composed_section_without_a_digest_is_refused(user: Config) -> None:
    """Earlier versions wrote such configs. Later changes of them cannot be detected."""
    with pytest.raises(UserError, match='with the config that was composed$'):
        composed(user, composed=True)


def test_settings_of_the_user_are_kept(user: Config) -> None:
    cfg = compose(user)
    kept = (
        *('val_cfg', 'val_dataloader', 'val_evaluator', 'test_cfg', 'test_dataloader', 'test_evaluator'),
        *('visualizer', 'env_cfg', 'load_from', 'work_dir'),
    )
    assert {key: cfg[key] for key in kept} == {key: user[key] for key in kept}
    assert cfg.default_hooks.logger.interval == 5
    assert cfg.default_hooks.checkpoint.interval == 2


def test_float_training_settings_are_replaced_completely(user: Config) -> None:
    cfg = compose(user)
    assert cfg.model.type == 'mmzsq.ZeroShotDetector'
    assert cfg.model.detector == user.model
    assert cfg.model.teacher == 'teacher.pth'
    assert set(cfg.train_cfg) == {'type', 'max_epochs', 'val_interval'}
    assert 'batch_sampler' not in cfg.train_dataloader
    assert cfg.train_dataloader.dataset.type == 'mmzsq.CalibrationDataset'
    assert 'momentum' not in cfg.optim_wrapper.optimizer
    assert types(cfg.param_scheduler) == ['mmengine.CosineAnnealingLR']
    assert cfg.auto_scale_lr.enable is False


def test_a_preprocessor_beside_the_model_moves_into_the_detector(user: Config) -> None:
    """MMEngine's Runner would pass it to the model of teacher and student."""
    user.data_preprocessor = dict(type='DetDataPreprocessor', std=[1, 1, 1])
    cfg = compose(user)
    assert 'data_preprocessor' not in cfg
    assert cfg.model.detector.data_preprocessor == user.data_preprocessor
    user.model.data_preprocessor = dict(type='DetDataPreprocessor', std=[2, 2, 2])
    assert compose(user).model.detector.data_preprocessor.std == [2, 2, 2]


def test_the_teacher_is_that_of_the_section_or_load_from_of_a_new_run(user: Config) -> None:
    assert compose(user).model.teacher == compose(user).zsq.teacher == 'teacher.pth'
    assert composed(user, teacher='other.pth').model.teacher == 'other.pth'
    # With resume, load_from is the checkpoint to continue from.
    user.resume = True
    assert compose(user).model.teacher is None
    assert composed(user, teacher='other.pth').model.teacher == 'other.pth'


def test_hooks_of_float_training_and_save_best_are_removed(user: Config) -> None:
    cfg = compose(user)
    assert types(cfg.custom_hooks) == [
        *('EmptyCacheHook', 'mmzsq.CalibrationSetHook', 'mmzsq.QuantizerInitHook', 'mmzsq.FiniteLossHook'),
    ]
    assert 'save_best' not in cfg.default_hooks.checkpoint


def test_the_set_is_in_the_work_dir_unless_configured(user: Config) -> None:
    for cfg, folder in (
        (compose(user), 'out/calibration_set'),
        (composed(user, calibration_set=dict(dir='/sets/a')), '/sets/a'),
    ):
        assert cfg.train_dataloader.dataset.data_root == folder
        assert next(hook for hook in cfg.custom_hooks if 'root' in hook).root == folder


def test_values_of_the_section_reach_the_runner(user: Config) -> None:
    train = dict(batch_size=3, max_epochs=7, ema=0.99, bn='train', clip_grad=None, amp=True, schedule='constant')
    cfg = composed(user, train=train, calibration_set=dict(seed=5))
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_epochs, cfg.model.bn) == (3, 7, 'train')
    assert cfg.custom_hooks[-1].type == 'mmengine.EMAHook'
    assert cfg.custom_hooks[-1].momentum == pytest.approx(0.01)
    assert cfg.optim_wrapper.type == 'mmengine.AmpOptimWrapper'
    assert 'clip_grad' not in cfg.optim_wrapper
    assert cfg.param_scheduler == []
    assert cfg.randomness.seed == 5
    user.randomness = dict(seed=11)
    assert compose(user).randomness.seed == 11


@pytest.mark.parametrize(
    ('own', 'rest'),
    [
        (None, dict(seed=5, diff_rank_seed=True)),
        (dict(), dict(seed=5, diff_rank_seed=True)),
        (dict(seed=None, deterministic=True), dict(seed=5, deterministic=True, diff_rank_seed=True)),
        (dict(deterministic=True), dict(seed=5, deterministic=True, diff_rank_seed=True)),
        (dict(seed=0, diff_rank_seed=False), dict(seed=0, diff_rank_seed=False)),
    ],
)
def test_randomness_settings_of_the_user_are_kept(user: Config, own: Any, rest: dict[str, Any]) -> None:
    user.randomness = own
    cfg = composed(user, calibration_set=dict(seed=5))
    assert cfg.randomness == rest
    assert cfg.train_dataloader.sampler.seed == rest['seed']


def test_gradients_accumulate_and_the_average_follows_optimizer_steps(user: Config) -> None:
    assert composed(user).optim_wrapper.accumulative_counts == 1
    cfg = composed(user, train=dict(accumulate=4, ema=0.99))
    assert cfg.optim_wrapper.accumulative_counts == 4
    average = cfg.custom_hooks[-1]
    assert (average.type, average.interval, average.gamma) == ('mmengine.EMAHook', 4, 4 * 2000)


def test_quantizer_steps_have_a_separate_rate_and_no_decay(user: Config) -> None:
    cfg = composed(user, train=dict(optimizer=dict(lr=1e-4, weight_decay=0.1), step_lr=5e-3))
    steps = cfg.optim_wrapper.paramwise_cfg.custom_keys['_quantizer.']
    assert cfg.optim_wrapper.optimizer.lr * steps.lr_mult == pytest.approx(5e-3)
    assert steps.decay_mult == 0
    shared = composed(user, train=dict(step_lr=None))
    assert shared.optim_wrapper.paramwise_cfg.custom_keys['_quantizer.'].lr_mult == 1


@pytest.mark.parametrize(
    ('model', 'learned'),
    [
        (dict(type='MaskRCNN', roi_head=dict(bbox_head=dict(), mask_head=dict(type='FCNMaskHead'))), True),
        (dict(type='CascadeRCNN', roi_head=dict(mask_head=[dict(type='FCNMaskHead')])), True),
        (dict(type='CoDETR', roi_head=[dict(mask_head=dict(type='FCNMaskHead'))]), True),
        (dict(type='SOLO', mask_head=dict(type='SOLOHead')), True),
        (dict(type='RTMDet', bbox_head=dict(type='RTMDetInsSepBNHead', loss_mask=dict(type='DiceLoss'))), True),
        (dict(type='FasterRCNN', roi_head=dict(bbox_head=[dict()], mask_head=None)), False),
        (dict(type='YOLOX', bbox_head=dict(num_classes=2)), False),
    ],
)
def test_masks_are_loaded_if_the_detection_loss_uses_them(user: Config, model: dict[str, Any], learned: bool) -> None:
    user.model = model
    for weight, read in ((0.1, learned), (0.0, False)):
        cfg = composed(user, distillation=dict(detection_weight=weight))
        [load] = [step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'mmdet.LoadAnnotations']
        assert load.with_mask is read
        assert load.with_bbox is True
        # Only the detection loss reads masks.
        assert cfg.train_dataloader.collate_fn == dict(type='mmzsq.stack_images', labels=bool(weight))


# Mistakes.


@pytest.mark.parametrize(
    ('zsq', 'message'),
    [
        (dict(quantiser=dict()), "unknown key 'quantiser' in zsq. Did you mean 'quantizer'?"),
        (dict(train=dict(epochs=3)), "unknown key 'epochs' in zsq.train. Did you mean 'max_epochs'?"),
        (dict(calibration_set=dict(num_image=3)), "Did you mean 'num_images'?"),
        (dict(synthesis=dict(sythesise=dict())), "Did you mean 'synthesize'?"),
        (dict(distillation=dict(loss=[])), "Did you mean 'losses'?"),
        (
            dict(preset='papper'),
            "zsq.preset is 'papper', but must be one of 'default', 'instant', 'reconstruct', 'paper', "
            "'paper_transformer'. Did you mean 'paper'",
        ),
        (dict(presets=dict(defalt={})), "'default'"),
        (dict(presets=dict(default='papper')), "zsq.presets.default is 'papper', but must be one of 'default', .*"),
        (dict(presets=dict(default=dict(trian={}))), "unknown key 'trian' in zsq.presets.default"),
        (
            dict(train=dict(schedule='cosin')),
            "zsq.train.schedule is 'cosin', but must be 'cosine', 'linear' or 'constant'. Did you mean 'cosine'",
        ),
        (dict(train=dict(max_epochs=-1)), 'zsq.train.max_epochs is -1, but must be an integer of at least 0'),
        (dict(train=dict(batch_size=2.5)), 'zsq.train.batch_size is 2.5, but must be an integer of at least 1'),
        (dict(train=dict(accumulate=0)), 'zsq.train.accumulate is 0, but must be an integer of at least 1'),
        (
            dict(calibration_set=dict(num_images='many')),
            "zsq.calibration_set.num_images is 'many', but must be an integer",
        ),
        (
            dict(train=dict(optimizer=dict(type='AdamW'))),
            'zsq.train.optimizer has no lr. .* set zsq.train.optimizer.lr too',
        ),
        (
            dict(train=dict(optimizer=dict(lr='1e-3x'))),
            "zsq.train.optimizer.lr is '1e-3x', but must be a number above 0",
        ),
        (dict(train=dict(optimizer=dict(lr=0))), 'zsq.train.optimizer.lr is 0, but must be a number above 0'),
        (
            dict(train=dict(optimizer=dict(type='AdmaW', lr=1e-3))),
            "zsq.train.optimizer.type is 'AdmaW', but must be a registered optimizer. Did you mean 'AdamW'",
        ),
        (dict(train=dict(optimizer='AdamW')), "zsq.train.optimizer is 'AdamW', but must be a dict"),
        (dict(train=dict(step_lr='1e-3x')), "zsq.train.step_lr is '1e-3x', but must be a number of at least 0 or None"),
        (dict(train=dict(ema=True)), 'zsq.train.ema is True, but must be a number of at least 0 and below 1 or None'),
        (dict(train=dict(ema=5)), 'zsq.train.ema is 5, but must be a number of at least 0 and below 1 or None'),
        (dict(train=dict(clip_grad=-1)), 'zsq.train.clip_grad is -1, but must be a number of at least 0 or None'),
        (dict(train=None), 'zsq.train is None, but must be a dict'),
        (dict(synthesis=[1]), r'zsq.synthesis is \[1\], but must be a dict'),
        (dict(train=dict(amp='no')), "zsq.train.amp is 'no', but must be True or False"),
        (dict(train=dict(final_lr_ratio='x')), "zsq.train.final_lr_ratio is 'x', but must be a number from 0 to 1"),
        (dict(train=dict(num_workers=-1)), 'zsq.train.num_workers is -1, but must be an integer of at least 0'),
        (dict(train=dict(max_epochs=True)), 'zsq.train.max_epochs is True, but must be an integer'),
        (
            dict(train=dict(bn='frozn')),
            "zsq.train.bn is 'frozn', but must be 'frozen' or 'train'. Did you mean 'frozen'",
        ),
        (
            dict(train=dict(augmentation=dict(flip=2))),
            'zsq.train.augmentation.flip is 2, but must be a number from 0 to 1',
        ),
        (
            dict(train=dict(augmentation=dict(colour=1))),
            "unknown key 'colour' in zsq.train.augmentation. Did you mean 'color'",
        ),
        (dict(synthesis=dict(lr='0.1')), "zsq.synthesis.lr is '0.1', but must be a number above 0"),
        (dict(synthesis=dict(lr=-1)), 'zsq.synthesis.lr is -1, but must be a number above 0'),
        (dict(synthesis=dict(lr=float('nan'))), 'zsq.synthesis.lr is nan, but must be a number above 0'),
        (dict(synthesis=dict(detection_weight=None)), 'zsq.synthesis.detection_weight is None, but must be a number'),
        (dict(synthesis=dict(clamp='yes')), "zsq.synthesis.clamp is 'yes', but must be True or False"),
        (
            dict(synthesis=dict(relabel=dict(batch_size=0))),
            'zsq.synthesis.relabel.batch_size is 0, but must be an integer',
        ),
        (dict(synthesis=dict(betas=[0.9])), 'zsq.synthesis.betas is .*, but must be two numbers'),
        (
            dict(synthesis=dict(betas='x')),
            "zsq.synthesis.betas is 'x', but must be two numbers of at least 0 and below 1",
        ),
        (dict(synthesis=dict(cutout='yes')), "zsq.synthesis.cutout is 'yes', but must be a dict"),
        (dict(synthesis=dict(cutout=dict(area=(0.5, 0.2)))), r'zsq.synthesis.cutout.area is \(0.5, 0.2\), but must be'),
        (dict(synthesis=dict(priors=[None])), r'zsq.synthesis.priors\[0\] is None, but must be a dict'),
        (dict(synthesis=dict(priors=[dict(type='NoPrior')])), r"zsq.synthesis.priors\[0\].type is 'NoPrior'"),
        (dict(synthesis=dict(refine=dict(iterations=0))), 'zsq.synthesis.refine.iterations is 0'),
        (dict(calibration_set=dict(seed=-1)), 'zsq.calibration_set.seed is -1, but must be an integer from 0'),
        (dict(label_sampler=dict(warmup='x')), 'warmup'),
        (dict(label_sampler=dict(type='NoSampler')), "zsq.label_sampler.type is 'NoSampler'"),
        (dict(distillation=dict(losses=[dict(type='NoLoss')])), r"zsq.distillation.losses\[0\].type is 'NoLoss'"),
        (
            dict(distillation=dict(detection_weight='a')),
            "zsq.distillation.detection_weight is 'a', but must be a number",
        ),
        (dict(quantizer=dict(w_bits='four')), "zsq.quantizer.w_bits is 'four', but must be an integer from 2 to 8"),
        (dict(quantizer=dict(a_bits=None)), 'zsq.quantizer.a_bits is None, but must be an integer from 2 to 8'),
        (dict(teacher=5), 'zsq.teacher is 5, but must be a string or None'),
        (dict(preset=['paper']), r"zsq.preset is \['paper'\], but must be one of"),
        (dict(presets='paper'), "zsq.presets is 'paper', but must be a dict"),
        (dict(presets=dict(default=dict(train=5))), 'zsq.presets.default.train is 5, but must be a dict'),
        (dict(quantizer={1: 2}), 'zsq.quantizer has the key 1, but keys must be strings'),
        (dict(train={(1, 2): 3}), r'zsq.train has the key \(1, 2\), but keys must be strings'),
        (dict(quantizer=dict(overrides={1: 2})), 'zsq.quantizer.overrides has the key 1, but keys must be strings'),
        (dict(quantizer=dict(scope=[])), r'zsq.quantizer.scope is \[\], but must be a module pattern'),
        (
            dict(quantizer=dict(weight=dict(narrow=5))),
            'zsq.quantizer.weight.narrow is 5, but must be True, False or None',
        ),
        (
            dict(synthesis=dict(refine=[dict(image_size=64, iterations=1), dict(image_size=64, iterations=0)])),
            r'zsq.synthesis.refine\[1\].iterations is 0',
        ),
        (
            dict(train=dict(optimizer=dict(type=5, lr=1e-3))),
            'zsq.train.optimizer.type is 5, but must be a registered optimizer',
        ),
        (dict(label_sampler=dict(type=5)), 'zsq.label_sampler.type is 5, which is not a registered label sampler'),
        (
            dict(label_sampler=dict(start=dict(num_boxes=(5, 1)))),
            'zsq.label_sampler.start: MultiBoxSampler: num_boxes must be two numbers',
        ),
        (
            dict(label_sampler=dict(type='mmzsq.RealLabelSampler', ann_file=5)),
            'zsq.label_sampler: RealLabelSampler: ann_file must be a path',
        ),
        (
            dict(synthesis=dict(priors=[dict(type='mmzsq.TotalVariationPrior', weight=float('nan'))])),
            r'zsq.synthesis.priors\[0\]: TotalVariationPrior: weight must be a number of at least 0, got nan',
        ),
        (
            dict(synthesis=dict(priors=[dict(type='mmzsq.BNStatisticsPrior', first_weight='x')])),
            r"zsq.synthesis.priors\[0\]: BNStatisticsPrior: first_weight must be a number of at least 0, got 'x'",
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmdet.FocalLoss')])),
            "'mmdet.FocalLoss', which is not a registered DistillationLoss. Registered: mmzsq.DensePredictionLoss",
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmzsq.PredictionKLLoss', tau=0)])),
            r'zsq.distillation.losses\[0\]: PredictionKLLoss: tau must be above 0',
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmzsq.PredictionKLLoss', heads=[5])])),
            'PredictionKLLoss: heads must be a module pattern',
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmzsq.FeatureMSELoss', modules=[])])),
            'FeatureMSELoss: modules must be a module pattern',
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmzsq.FeatureMSELoss', normalize='no')])),
            "FeatureMSELoss: normalize must be True or False, got 'no'",
        ),
        (
            dict(distillation=dict(losses=[dict(type='mmzsq.PredictionLoss', loss_weight=None)])),
            'PredictionLoss: loss_weight must be a number of at least 0, got None',
        ),
        (
            dict(calibration_set=dict(real=dict(type='CocoDataset', pipeline=[dict()]))),
            'zsq.calibration_set.real.pipeline is .*, but must be a list of dicts with a type',
        ),
    ],
)
def test_a_mistake_in_the_section_is_named(user: Config, zsq: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        composed(user, **zsq)


@pytest.mark.parametrize('section', [None, 5, 'w4a8', [1]])
def test_a_section_that_is_not_a_dict_is_refused(user: Config, section: Any) -> None:
    user.zsq = section
    with pytest.raises(UserError, match='zsq is .*, but must be a dict'):
        compose(user)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model=5), 'model is 5, but must be a dict'),
        (dict(default_hooks=dict(checkpoint=5)), 'default_hooks.checkpoint is 5, but must be a dict or None'),
        (dict(custom_hooks=[None]), 'custom_hooks must be a list of dicts with a type, but holds None'),
        (dict(custom_hooks=[dict()]), 'custom_hooks must be a list of dicts with a type, but holds {}'),
        (dict(val_dataloader=5), 'val_dataloader is 5, but must be a dict'),
        (dict(randomness=dict(seed=-1)), 'randomness.seed is -1, but must be an integer from 0'),
        (dict(randomness=dict(seed='x')), "randomness.seed is 'x', but must be an integer from 0"),
    ],
)
def test_a_mistake_beside_the_section_is_named(user: Config, changes: dict[str, Any], message: str) -> None:
    for key, value in changes.items():
        user.pop(key, None)
        user[key] = value
    with pytest.raises(UserError, match=message):
        compose(user)


@pytest.mark.parametrize(('key', 'message'), [('zsq', 'no zsq section'), ('model', 'no model')])
def test_a_config_without_the_section_or_a_model_is_refused(user: Config, key: str, message: str) -> None:
    user.pop(key)
    with pytest.raises(UserError, match=message):
        compose(user)


# Merging.


def test_mappings_merge_by_key_and_other_values_are_replaced() -> None:
    base = dict(a=dict(b=1, c=[1, 2]), d=4)
    merged = merge(base, dict(a=dict(c=[3]), e=None))
    assert merged == dict(a=dict(b=1, c=[3]), d=4, e=None)
    merged['a']['c'].append(4)
    assert base == dict(a=dict(b=1, c=[1, 2]), d=4)


@pytest.mark.parametrize(
    ('override', 'merged'),
    [
        (dict(type='A', y=2), dict(type='A', x=1, y=2)),
        (dict(type='B', y=2), dict(type='B', y=2)),
        (dict(_delete_=True, y=2), dict(y=2)),
        (dict(y=2), dict(type='A', x=1, y=2)),
        ('B', 'B'),
    ],
)
def test_another_type_replaces_the_base(override: Any, merged: Any) -> None:
    assert merge(dict(part=dict(type='A', x=1)), dict(part=override)) == dict(part=merged)


# Class names.


@pytest.mark.parametrize(
    ('dataset', 'names'),
    [
        (dict(type='CocoDataset', metainfo=dict(classes=('cat',)), ann_file='/nowhere.json'), ['cat']),
        (dict(type='mmzsq.ShapesDataset'), 8),
        (dict(type='CocoDataset', data_root='/nowhere'), 80),
        (dict(type='RepeatDataset', dataset=dict(type='VOCDataset')), 20),
        (dict(type='ConcatDataset', datasets=[dict(metainfo=dict(classes=['a', 'b']))]), ['a', 'b']),
        (dict(type='NeverRegistered'), None),
    ],
)
def test_class_names_come_from_the_config_without_reading_data(dataset: Any, names: list[str] | int | None) -> None:
    register_all_modules()
    found = class_names(Config(dict(val_dataloader=dict(dataset=dataset))))
    assert (found if found is None or not isinstance(names, int) else len(found)) == names


def test_evaluation_names_the_classes_before_training_does() -> None:
    loaders = {
        f'{name}_dataloader': dict(dataset=dict(metainfo=dict(classes=(name,)))) for name in ('train', 'test', 'val')
    }
    assert class_names(Config(loaders)) == ['val']
    assert class_names(Config(dict(val_dataloader=None, **{'train_dataloader': loaders['train_dataloader']}))) == [
        'train'
    ]


def test_class_names_fall_back_to_the_training_data(user: Config) -> None:
    names = ['sheep', 'goat']
    user.train_dataloader.dataset = dict(type='RepeatDataset', dataset=dict(metainfo=dict(classes=names)))
    for loader in ('val_dataloader', 'test_dataloader'):
        user.pop(loader)
    [generate] = [hook for hook in compose(user).custom_hooks if hook.type == 'mmzsq.CalibrationSetHook']
    assert generate.classes == names


# Presets.


def test_changes_of_one_preset_do_not_affect_another() -> None:
    """They override the preset, and settings for all presets override them."""
    zsq = dict(
        presets=dict(default=dict(train=dict(batch_size=3, max_epochs=4, optimizer=dict(lr=1e-3)))),
        train=dict(max_epochs=5),
    )
    train = complete_section(zsq)['train']
    assert (train['batch_size'], train['max_epochs'], train['optimizer']) == (3, 5, dict(type='Adam', lr=1e-3))
    paper = complete_section(dict(zsq, preset='paper'))
    assert paper == complete_section(dict(preset='paper', train=dict(max_epochs=5)))
    assert 'presets' not in paper


def test_instant_takes_what_a_leaf_changes_in_default_except_images_and_schedule() -> None:
    changes = dict(
        calibration_set=dict(num_images=9),
        synthesis=dict(synthesize=dict(image_size=608)),
        train=dict(max_epochs=60, channels_last=True),
    )
    section = complete_section(dict(preset='instant', presets=dict(default=changes)))
    assert section['synthesis']['synthesize']['image_size'] == 608
    assert section['calibration_set']['source'] == 'procedural'
    assert (
        section['calibration_set']['num_images']
        == 64
        == section['train']['batch_size'] * section['train']['init_batches']
    )
    assert (section['train']['max_epochs'], section['train']['channels_last']) == (0, True)
    changed = dict(default=changes, instant=dict(calibration_set=dict(num_images=16)))
    section = complete_section(dict(preset='instant', presets=changed, train=dict(max_epochs=2)))
    assert (section['calibration_set']['num_images'], section['train']['max_epochs']) == (16, 2)


def test_a_preset_can_be_replaced_by_another() -> None:
    zsq = dict(presets=dict(paper='paper_transformer', paper_transformer=dict(train=dict(max_epochs=4))))
    section = complete_section(dict(zsq, preset='paper', train=dict(batch_size=3)))
    expected = complete_section(dict(preset='paper_transformer', train=dict(batch_size=3)))
    # The name stays that of the config.
    assert section == dict(expected, preset='paper')
    assert complete_section(zsq) == complete_section({})


def test_single_values_of_a_preset_can_be_changed() -> None:
    section = complete_section(dict(preset='paper', quantizer=dict(w_bits=4), train=dict(max_epochs=3)))
    assert (section['quantizer']['w_bits'], section['quantizer']['step']) == (4, 'linear')
    assert (section['train']['max_epochs'], section['train']['bn']) == (3, 'train')
    assert complete_section({})['preset'] == 'default'


# Defaults that depend on the bits.


@pytest.mark.parametrize(
    ('bits', 'lr', 'step_lr'), [((8, 8), 2e-5, 2e-4), ((6, 6), 1e-4, 2e-3), ((4, 8), 1e-4, 2e-3), ((8, 4), 1e-4, 2e-3)]
)
def test_students_of_8_bits_have_lower_rates(bits: tuple[int, int], lr: float, step_lr: float) -> None:
    quantizer = dict(w_bits=bits[0], a_bits=bits[1])
    train = complete_section(dict(quantizer=quantizer))['train']
    assert (train['optimizer']['lr'], train['step_lr']) == (lr, step_lr)
    own = complete_section(dict(quantizer=quantizer, train=dict(optimizer=dict(lr=1e-3))))['train']
    assert own['optimizer'] == dict(type='Adam', lr=1e-3)
    paper = complete_section(dict(preset='paper', quantizer=quantizer))['train']
    assert (paper['optimizer']['lr'], paper['step_lr']) == (1e-4, None)


@pytest.mark.parametrize(
    ('train', 'size'),
    [
        ({}, 0.04),
        (dict(optimizer=dict(weight_decay=0.1)), 0.04),
        (dict(optimizer=dict(lr=1e-4)), None),
        (dict(optimizer=dict(lr=1e-4), weight_size=0.1), 0.1),
    ],
)
def test_a_learning_rate_of_the_user_is_taken_as_it_is(user: Config, train: dict[str, Any], size: float | None) -> None:
    cfg = composed(user, train=train)
    assert cfg.zsq.train.weight_size == size
    assert cfg.optim_wrapper.paramwise_cfg.weight_size == size


@pytest.mark.parametrize(('bits', 'size'), [((8, 8), None), ((8, 4), 0.04), ((6, 6), 0.04)])
def test_the_learning_rate_of_8_bits_is_taken_as_it_is(user: Config, bits: tuple[int, int], size: float | None) -> None:
    quantizer = dict(w_bits=bits[0], a_bits=bits[1])
    assert composed(user, quantizer=quantizer).zsq.train.weight_size == size
    asked = composed(user, quantizer=quantizer, train=dict(weight_size=0.1))
    assert asked.zsq.train.weight_size == 0.1


# Defaults that depend on the detector.


# Defaults that depend on whether a loss reads labels.


def test_images_are_augmented_unless_a_loss_reads_labels() -> None:
    assert complete_section({})['train']['augmentation'] == dict(flip=0.5, mosaic=0.5, color=0.3)
    labels = dict(detection_weight=0.5)
    for zsq in (
        dict(distillation=labels),
        dict(presets=dict(default=dict(distillation=labels))),
        dict(preset='paper'),
    ):
        assert complete_section(zsq)['train']['augmentation'] is None
    with pytest.raises(UserError, match='zsq.train.augmentation changes images and not their labels'):
        complete_section(dict(distillation=labels, train=dict(augmentation=dict(flip=1.0))))
    with pytest.raises(UserError, match='zsq.distillation is 5, but must be a dict'):
        complete_section(dict(distillation=5))


@pytest.mark.parametrize(('image_size', 'scale'), [(96, (96, 96)), ([64, 96], (96, 64))])
def test_training_images_are_resized_if_configured(user: Config, image_size: Any, scale: Any) -> None:
    plain = composed(user).train_dataloader.dataset.pipeline
    pipeline = composed(user, train=dict(image_size=image_size)).train_dataloader.dataset.pipeline
    # After the labels are loaded, so that they are resized too.
    resize = dict(type='mmdet.Resize', scale=scale, keep_ratio=False)
    assert pipeline == [*plain[:2], resize, *plain[2:]] and plain[1]['type'] == 'mmdet.LoadAnnotations'
    for wrong in (0, 'large', [640], [640, 480.0]):
        with pytest.raises(
            UserError, match=r'zsq.train.image_size.* is .*, but must be (one side of a square|an integer)'
        ):
            composed(user, train=dict(image_size=wrong))


def test_a_run_without_any_loss_is_refused(user: Config) -> None:
    with pytest.raises(UserError, match='nothing to learn from: zsq.distillation.losses is empty'):
        composed(user, distillation=dict(losses=[]))
    composed(user, distillation=dict(losses=[], detection_weight=1.0))


EXAMPLES = dict(
    LoadImageFromFile=TRANSFORMS, Resize=TRANSFORMS, LoadAnnotations=TRANSFORMS, EMAHook=HOOKS, ExpMomentumEMA=MODELS
)


def test_everything_that_compose_writes_names_its_scope(user: Config) -> None:
    """A project with a scope of its own may register classes of the same names."""
    user.model = dict(type='mine.Detector')
    user.default_hooks = dict()
    user.custom_hooks = []
    kept = ('val_cfg', 'val_dataloader', 'val_evaluator', 'test_cfg', 'test_dataloader', 'test_evaluator')
    for key in (*kept, 'visualizer'):
        user.pop(key)
    for amp, schedule in ((False, 'linear'), (True, 'cosine')):
        cfg = composed(user, train=dict(amp=amp, image_size=64, ema=0.999, schedule=schedule))
        # Optimizers are the user's choice.
        cfg.optim_wrapper.pop('optimizer')
        cfg.zsq.train.pop('optimizer')
        written = list(types_in(cfg.to_dict()))
        assert len(written) > 20
        assert [kind for kind in written if '.' not in kind] == []
        for kind, registry in EXAMPLES.items():
            [name] = {name for name in written if name.endswith(f'.{kind}')}
            assert registry.get(name).__name__ == kind


def types_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ('type', 'ema_type'):
                yield inner
            yield from types_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from types_in(inner)


# Real images, for comparison.


def test_real_images_use_the_test_pipeline_and_no_set_is_made(user: Config) -> None:
    user.test_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ]
    real = dict(type='CocoDataset', data_root='data/x', ann_file='a.json')
    cfg = composed(user, calibration_set=dict(real=real))
    loader = cfg.train_dataloader
    assert (loader.dataset.type, loader.sampler.type) == ('mmzsq.SeededDataset', 'mmzsq.SeededSampler')
    dataset = loader.dataset.dataset
    assert (dataset.type, dataset.data_root, dataset.ann_file) == ('CocoDataset', 'data/x', 'a.json')
    kinds = ['LoadImageFromFile', 'mmdet.LoadAnnotations', 'Resize', 'PackDetInputs']
    assert [step.type for step in dataset.pipeline] == kinds
    assert 'mmzsq.CalibrationSetHook' not in types(cfg.custom_hooks)
    assert 'mmzsq.QuantizerInitHook' in types(cfg.custom_hooks)


def test_real_images_need_a_test_pipeline(user: Config) -> None:
    user.pop('test_dataloader')
    with pytest.raises(UserError, match='no test_dataloader'):
        composed(user, calibration_set=dict(real=dict(type='CocoDataset')))


@pytest.mark.parametrize('kind', ['mmcv.Normalize', 'Normalize'])
def test_a_pipeline_that_normalizes_is_refused(user: Config, kind: str) -> None:
    user.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type=kind, mean=[0], std=[255])]
    with pytest.raises(UserError, match=rf'normalizes images \({kind}\).*set mean, std and bgr_to_rgb'):
        compose(user)
