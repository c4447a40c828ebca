# SPDX-License-Identifier: Apache-2.0
"""From a detector's config and a ``zsq`` section to a plain config that MMEngine's Runner runs.

:func:`compose` is a pure function. It replaces what training needs (model, train loop, loader, optimizer, schedules)
and keeps what is the user's: validation, test, visualizer, environment and hooks.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config, ConfigDict
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.config.presets import PRESETS, preset_section
from mmzsq.errors import UserError, check_keys
from mmzsq.registry import resolve_class

MODEL_TYPE = 'mmzsq.ZeroShotDetector'

SECTION_KEYS: dict[str, set[str]] = dict(
    calibration_set={'dir', 'num_images', 'batch_size', 'seed', 'real'},
    synthesis={
        *(
            'relabel',
            'refine',
            'synthesize',
            'priors',
            'require_feature_prior',
            'detection_weight',
            'detection_reduction',
        ),
        *('lr', 'warmup', 'betas', 'init'),
        *('cutout', 'clamp', 'keep', 'keep_interval', 'precision', 'capture'),
    },
    distillation={'detection_weight', 'losses'},
    train={
        *('max_epochs', 'batch_size', 'num_workers', 'optimizer', 'step_lr', 'schedule', 'final_lr_ratio'),
        *('accumulate', 'bn', 'ema', 'clip_grad', 'amp', 'init_batches', 'capture'),
        *('augmentation', 'image_size', 'channels_last'),
    },
)
PART_SECTIONS = ('quantizer', 'label_sampler')
TOP_KEYS = ('preset', 'presets', 'composed', *SECTION_KEYS, *PART_SECTIONS)

TRAINING_ONLY_HOOKS = (
    *('YOLOXModeSwitchHook', 'PipelineSwitchHook', 'SyncNormHook', 'EMAHook', 'MeanTeacherHook', 'EarlyStoppingHook'),
)
"""Custom hooks that steer the training of the float detector; meaningless or harmful to a student's."""


def merge(base: Any, override: Any) -> Any:
    """Overlay ``override`` on ``base``: mappings key by key, all else replaced.

    A mapping that names another ``type`` than the base, or has ``_delete_=True``, replaces the base as a whole.
    """
    if not isinstance(base, Mapping) or not isinstance(override, Mapping):
        return copy.deepcopy(override)
    override = dict(override)
    other_type = 'type' in override and 'type' in base and override['type'] != base['type']
    if override.pop('_delete_', False) or other_type:
        return copy.deepcopy(override)
    merged = copy.deepcopy(dict(base))
    for key, value in override.items():
        merged[key] = merge(base[key], value) if key in base else copy.deepcopy(value)
    return merged


def complete_section(zsq: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fill a ``zsq`` section with its preset and check it.

    Args:
        zsq: The section as a config gives it.
        model: Config of the detector, on which a preset may depend; None: any.

    Returns:
        A section with every key.

    Raises:
        UserError: If a key or the preset is unknown, or a number is out of range.
    """
    check_keys(zsq, TOP_KEYS, 'zsq')
    preset = zsq.get('preset', 'default')
    if preset not in PRESETS:
        raise UserError(f'zsq.preset is one of {", ".join(map(repr, PRESETS))}, not {preset!r}')
    of_presets = zsq.get('presets') or {}
    check_keys(of_presets, PRESETS, 'zsq.presets')
    changes = of_presets.get(preset) or {}
    if isinstance(changes, str) and changes not in PRESETS:
        raise UserError(f'zsq.presets.{preset} is a dict or one of {", ".join(map(repr, PRESETS))}, not {changes!r}')
    source, changes = (changes, {}) if isinstance(changes, str) else (preset, changes)
    two_stages = two_stages_on_batch_norm(model or {})
    defaults = merge(preset_section(source, merge(changes, zsq), two_stages), changes)
    section = merge(dict(defaults, preset=preset), {key: value for key, value in zsq.items() if key != 'presets'})
    check_keys(section, TOP_KEYS, f'zsq.presets.{preset}')
    for name in (*SECTION_KEYS, *PART_SECTIONS):
        if not isinstance(section[name], Mapping):
            raise UserError(f'zsq.{name} is a dict, not {section[name]!r}')
    for name, allowed in SECTION_KEYS.items():
        check_keys(section[name], allowed, f'zsq.{name}')
    for name, key in (
        *(('calibration_set', key) for key in ('num_images', 'batch_size')),
        *(('train', key) for key in ('max_epochs', 'batch_size', 'accumulate', 'init_batches')),
    ):
        value = section[name][key]
        if not isinstance(value, int) or value < 1:
            raise UserError(f'zsq.{name}.{key} is a whole number of at least 1, not {value!r}')
    _check_rates(section['train'])
    if not section['distillation']['losses'] and not section['distillation']['detection_weight']:
        raise UserError(
            'nothing to learn from: zsq.distillation.losses is empty and zsq.distillation.detection_weight is 0'
        )
    if section['train']['schedule'] not in ('cosine', 'linear', 'constant'):
        nearest = difflib.get_close_matches(
            str(section['train']['schedule']), ('cosine', 'linear', 'constant'), n=1, cutoff=0
        )
        raise UserError(
            f"zsq.train.schedule is 'cosine', 'linear' or 'constant', not {section['train']['schedule']!r}; "
            f'did you mean {nearest[0]!r}?'
        )
    return section


def _check_rates(train: Mapping[str, Any]) -> None:
    optimizer = train['optimizer']
    if not isinstance(optimizer, Mapping):
        raise UserError(f'zsq.train.optimizer is a dict, not {optimizer!r}')
    if optimizer.get('lr') is None:
        raise UserError(
            "zsq.train.optimizer has no lr: one of another type than the preset's takes nothing from it, so set "
            'zsq.train.optimizer.lr too'
        )
    if not _is_number(optimizer['lr']) or optimizer['lr'] <= 0:
        raise UserError(f'zsq.train.optimizer.lr is a number above 0, not {optimizer["lr"]!r}')
    for key in ('step_lr', 'ema', 'clip_grad'):
        if train[key] is not None and (not _is_number(train[key]) or train[key] < 0):
            raise UserError(f'zsq.train.{key} is None or a number of at least 0, not {train[key]!r}')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def compose(cfg: Config) -> Config:
    """Compose the runnable config; the argument is left as it is, a composed config comes back as a copy.

    Args:
        cfg: A detector's config with a ``zsq`` section; ``work_dir`` set if ``zsq.calibration_set.dir`` is not.

    Raises:
        UserError: If the section or the detector's config is unfit, or the section of a composed config has changed.
    """
    cfg = copy.deepcopy(cfg)
    if 'zsq' not in cfg:
        raise UserError(
            "this config has no zsq section: add a base such as 'mmzsq::_base_/zsq_w4a8.py' beside that of the detector"
        )
    if 'model' not in cfg:
        raise UserError("this config has no model: add the detector's config to _base_, beside the zsq base")
    if cfg.zsq.get('composed'):
        _check_unchanged(cfg.zsq.to_dict())
        return cfg
    section = complete_section(cfg.zsq.to_dict(), cfg.model)
    if section['calibration_set']['dir'] is None:
        section['calibration_set']['dir'] = str(Path(cfg.get('work_dir') or 'work_dirs') / 'calibration_set')
    train = section['train']
    # Before the user's training data makes room for the set.
    classes = class_names(cfg)
    # MMEngine's Runner would hand it to its model, which is no longer the detector.
    if (preprocessor := cfg.pop('data_preprocessor', None)) is not None:
        cfg.model.setdefault('data_preprocessor', preprocessor)
    _replace(cfg, 'zsq', dict(section, composed=dict(config=cfg.filename, digest=_digest(section))))
    _replace(
        cfg,
        'model',
        dict(
            type=MODEL_TYPE,
            detector=cfg.model.to_dict(),
            quantizer=section['quantizer'],
            distillation=section['distillation'],
            teacher=cfg.get('load_from'),
            bn=train['bn'],
            capture=train['capture'],
            augmentation=train['augmentation'],
            channels_last=train['channels_last'],
        ),
    )
    _replace(cfg, 'train_cfg', dict(type='EpochBasedTrainLoop', max_epochs=train['max_epochs'], val_interval=10**9))
    # Only the detection loss reads masks; decoding them takes about half as long as reading the image.
    with_mask = bool(section['distillation']['detection_weight']) and has_masks(cfg.model.detector)
    _replace(cfg, 'train_dataloader', _train_dataloader(cfg, section, with_mask))
    _replace(cfg, 'optim_wrapper', _optim_wrapper(train))
    _replace(cfg, 'param_scheduler', _param_scheduler(train))
    _replace(cfg, 'model_wrapper_cfg', dict(type='mmzsq.AveragingDataParallel'))
    cfg.custom_hooks = _custom_hooks(cfg, section, classes)
    if 'auto_scale_lr' in cfg:
        cfg.auto_scale_lr.enable = False
    checkpoint_hook = cfg.get('default_hooks', {}).get('checkpoint')
    if checkpoint_hook is not None:
        # Choosing a checkpoint by its accuracy on real images would not be zero-shot.
        checkpoint_hook.pop('save_best', None)
    if cfg.get('randomness') is None:
        cfg.randomness = dict()
    if cfg.randomness.get('seed') is None:
        cfg.randomness.seed = section['calibration_set']['seed']
    # Processes augment unlike each other, and draw from one order of the images.
    cfg.randomness.setdefault('diff_rank_seed', True)
    cfg.train_dataloader.sampler.seed = cfg.randomness.seed
    return cfg


def _digest(section: Mapping[str, Any]) -> str:
    """Of what a section says, which is the same once it was written to a file and read again."""
    said = {key: value for key, value in section.items() if key != 'composed'}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _check_unchanged(section: Mapping[str, Any]) -> None:
    """Refuse a composed section that says something else now: model, loader and hooks were made from the old one."""
    composed = section['composed']
    composed = composed if isinstance(composed, Mapping) else {}
    if composed.get('digest') != _digest(section):
        raise UserError(
            'this config is composed already, and its zsq section is no longer the one that model, loader and hooks '
            'were made from: it would have no effect. Give --cfg-options zsq.* (and --amp) with the config that was '
            f'composed{": " + composed["config"] if composed.get("config") else ""}'
        )


def _replace(cfg: Config, key: str, value: Any) -> None:
    """Set ``cfg[key]``; assigning a dict to an existing key of a Config would keep the old ConfigDict's keys."""
    cfg.pop(key, None)
    cfg[key] = ConfigDict(value) if isinstance(value, dict) else value


def has_masks(model: Any) -> bool:
    """Whether any part of a detector's config has a mask head or, as RTMDet-Ins in its box head, a mask loss."""
    if isinstance(model, Mapping):
        return any(key in ('mask_head', 'loss_mask') and value is not None for key, value in model.items()) or any(
            has_masks(value) for value in model.values()
        )
    return isinstance(model, (list, tuple)) and any(has_masks(part) for part in model)


def two_stages_on_batch_norm(model: Mapping[str, Any]) -> bool:
    """Whether a detector looks again at regions it proposes, by its config, with BatchNorm layers in its backbone."""
    backbone = model.get('backbone')
    if any(model.get(head) is None for head in ('rpn_head', 'roi_head')) or not isinstance(backbone, Mapping):
        return False
    norm = backbone['norm_cfg'] if 'norm_cfg' in backbone else _default_norm(backbone.get('type'))
    layer = resolve_class(MODELS, norm.get('type')) if isinstance(norm, Mapping) else None
    # As BNStatisticsPrior asks.
    return inspect.isclass(layer) and issubclass(layer, _BatchNorm)


def _default_norm(backbone_type: Any) -> Any:
    """What the ``norm_cfg`` of a backbone is where its config has none; None if it takes none or is not known."""
    for base in getattr(resolve_class(MODELS, backbone_type), '__mro__', ()):
        parameters = inspect.signature(base.__init__).parameters
        if 'norm_cfg' in parameters:
            return parameters['norm_cfg'].default
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            # It hands nothing on.
            return None
    return None


def _train_dataloader(cfg: Config, section: dict[str, Any], with_mask: bool) -> dict[str, Any]:
    train = section['train']
    annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=with_mask)
    real = section['calibration_set']['real']
    if real is not None:
        # Bitmaps or polygons, as the detector's own training reads them.
        own: Mapping[str, Any] = next(
            (step for step in real.get('pipeline', []) if 'LoadAnnotations' in str(step['type'])), {}
        )
        if 'poly2mask' in own:
            annotations['poly2mask'] = own['poly2mask']
        dataset = dict(real, pipeline=real_pipeline(cfg, annotations))
    else:
        dataset = dict(
            type='mmzsq.CalibrationDataset',
            data_root=section['calibration_set']['dir'],
            pipeline=[
                dict(type='LoadImageFromFile'),
                annotations,
                *_resize(train['image_size']),
                dict(
                    type='PackDetInputs',
                    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                ),
            ],
        )
    return dict(
        batch_size=train['batch_size'],
        num_workers=train['num_workers'],
        persistent_workers=train['num_workers'] > 0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        # Only the detection loss reads labels.
        collate_fn=dict(type='mmzsq.stack_images', labels=bool(section['distillation']['detection_weight'])),
        dataset=dataset,
    )


def _resize(image_size: Any) -> list[dict[str, Any]]:
    if image_size is None:
        return []
    sides = [image_size] * 2 if isinstance(image_size, int) else image_size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise UserError(f'zsq.train.image_size is None, one number, or (height, width) in pixels, not {image_size!r}')
    height, width = sides
    return [dict(type='Resize', scale=(width, height), keep_ratio=False)]


def real_pipeline(cfg: Config, annotations: dict[str, Any]) -> list[dict[str, Any]]:
    """How real images of a comparison are read: by the detector's test pipeline, with their labels from the start.

    Args:
        cfg: Of the detector.
        annotations: The transform that reads the labels; the geometric transforms behind it move them along.

    Raises:
        UserError: If the config has no test pipeline.
    """
    pipeline = ((cfg.get('test_dataloader') or {}).get('dataset') or {}).get('pipeline')
    if not pipeline:
        raise UserError(
            'zsq.calibration_set.real reads images as the detector is tested, and this config has no '
            'test_dataloader.dataset.pipeline'
        )
    load, *others = [dict(step) for step in pipeline if 'LoadAnnotations' not in step['type']]
    return [load, annotations, *others]


def _optim_wrapper(train: dict[str, Any]) -> dict[str, Any]:
    # MMEngine's constructor wants a base decay where single parameters have none.
    optimizer = dict(dict(weight_decay=0.0), **train['optimizer'])
    multiplier = 1.0 if train['step_lr'] is None else train['step_lr'] / optimizer['lr']
    wrapper = dict(
        type='AmpOptimWrapper' if train['amp'] else 'OptimWrapper',
        constructor='mmzsq.GroupedOptimWrapperConstructor',
        optimizer=optimizer,
        accumulative_counts=train['accumulate'],
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            bias_decay_mult=0.0,
            custom_keys={'_quantizer.': dict(lr_mult=multiplier, decay_mult=0.0)},
        ),
    )
    if train['amp']:
        wrapper['dtype'] = 'bfloat16'
    if train['clip_grad'] is not None:
        wrapper['clip_grad'] = dict(max_norm=train['clip_grad'], norm_type=2)
    return wrapper


def _param_scheduler(train: dict[str, Any]) -> list[dict[str, Any]]:
    common = dict(begin=0, end=train['max_epochs'], by_epoch=True, convert_to_iter_based=True)
    if train['schedule'] == 'cosine':
        ratio = train['final_lr_ratio']
        return [dict(type='CosineAnnealingLR', T_max=train['max_epochs'], eta_min_ratio=ratio, **common)]
    if train['schedule'] == 'linear':
        return [dict(type='LinearLR', start_factor=1.0, end_factor=train['final_lr_ratio'], **common)]
    return []


def _custom_hooks(cfg: Config, section: dict[str, Any], classes: list[str] | None) -> list[dict[str, Any]]:
    kept = [
        hook
        for hook in cfg.get('custom_hooks') or []
        # With a scope ('mmdet.PipelineSwitchHook') or without.
        if getattr(hook['type'], '__name__', hook['type']).rsplit('.', 1)[-1] not in TRAINING_ONLY_HOOKS
    ]
    calibration_set = section['calibration_set']
    generate = dict(
        type='mmzsq.CalibrationSetHook',
        root=calibration_set['dir'],
        num_images=calibration_set['num_images'],
        batch_size=calibration_set['batch_size'],
        seed=calibration_set['seed'],
        synthesis=section['synthesis'],
        label_sampler=section['label_sampler'],
        classes=classes,
    )
    own: list[dict[str, Any]] = [
        *([generate] if calibration_set['real'] is None else []),
        dict(type='mmzsq.QuantizerInitHook', num_batches=section['train']['init_batches']),
        dict(type='mmzsq.FiniteLossHook'),
    ]
    if section['train']['ema'] is not None:
        # YOLOv5's: the average follows closely at first and reaches its momentum after some 2000 steps.
        batches = section['train']['accumulate']
        own.append(
            dict(
                type='EMAHook',
                ema_type='ExpMomentumEMA',
                momentum=1 - section['train']['ema'],
                gamma=2000 * batches,
                interval=batches,
                update_buffers=True,
            )
        )
    return [*kept, *own]


def class_names(cfg: Config) -> list[str] | None:
    """Names of the categories as the config's data sets give them, without reading any data; None if they do not."""
    for loader in ('val_dataloader', 'test_dataloader', 'train_dataloader'):
        dataset: Any = (cfg.get(loader) or {}).get('dataset')
        while dataset is not None:
            classes = (dataset.get('metainfo') or {}).get('classes') or _registered_classes(dataset.get('type'))
            if classes:
                return [classes] if isinstance(classes, str) else list(classes)
            dataset = dataset.get('dataset') or next(iter(dataset.get('datasets') or []), None)
    return None


def _registered_classes(dataset_type: str | None) -> Sequence[str] | None:
    return getattr(resolve_class(DATASETS, dataset_type), 'METAINFO', {}).get('classes')
