# SPDX-License-Identifier: Apache-2.0
"""Compose a detector's config and its ``zsq`` section into a plain config that MMEngine's Runner runs.

:func:`compose` is a pure function. It replaces what trains the detector (model, train loop, data loader, optimizer,
schedules) and keeps the user's validation, test, visualizer, environment and hooks.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.optim import OPTIMIZERS

from mmzsq.class_names import declared_classes
from mmzsq.config.plain_types import plain_section, stable_text, with_plain_types
from mmzsq.config.presets import DERIVED, PRESETS, preset_section
from mmzsq.config.sections import PresetChanges, TrainConfig, ZsqSection
from mmzsq.distillation import DistillationLoss
from mmzsq.errors import UserError, check_keys
from mmzsq.pipelines import pipeline_of, transform_name
from mmzsq.registry import LABEL_SAMPLERS, MODELS, PRIORS, build_part, resolve_class
from mmzsq.tasks.supported_models import check_supported
from mmzsq.typed_section import describe, nearest, section_classes

MODEL_TYPE = 'mmzsq.ZeroShotDetector'

TRAINING_ONLY_HOOKS = (
    *('YOLOXModeSwitchHook', 'PipelineSwitchHook', 'SyncNormHook', 'EMAHook', 'MeanTeacherHook', 'EarlyStoppingHook'),
)
"""Custom hooks that control the training of the float detector. They are useless or harmful for a student."""


def merge(base: Any, override: Any) -> Any:
    """Overlay ``override`` on ``base``: mappings key by key, everything else as a whole.

    A mapping with another ``type`` than the base, or with ``_delete_=True``, replaces the whole base.
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


def complete_section(zsq: Any) -> dict[str, Any]:
    """Return the plain form of :func:`read_section`."""
    return read_section(zsq)[1]


def read_section(zsq: Any) -> tuple[ZsqSection, dict[str, Any]]:
    """Fill a ``zsq`` section with its preset and check it.

    Args:
        zsq: The section as a config gives it.

    Returns:
        The typed section, and its plain form with every key.

    Raises:
        UserError: If a key is unknown or a value is not allowed.
    """
    if not isinstance(zsq, Mapping):
        raise UserError(f'zsq is {zsq!r}, but must be a dict. zsq = dict() takes all values of the preset.')
    check_keys(zsq, ('presets', 'composed', *ZsqSection.model_fields), 'zsq')
    preset = _preset_name(zsq.get('preset', 'default'), 'zsq.preset')
    of_presets = zsq.get('presets')
    if of_presets is None:
        of_presets = {}
    if not isinstance(of_presets, Mapping):
        raise UserError(f'zsq.presets is {of_presets!r}, but must be a dict ({", ".join(PRESETS)}) or None.')
    check_keys(of_presets, PRESETS, 'zsq.presets')
    for name, of_preset in of_presets.items():
        _check_preset_changes(of_preset, f'zsq.presets.{name}')
    changes = of_presets.get(preset)
    if changes is None:
        changes = {}
    source = preset
    if isinstance(changes, str):
        source, changes = changes, {}
    adapted = of_presets.get('default')
    if source in DERIVED and isinstance(adapted, Mapping):
        # Such as the image size of the detector.
        changes = merge(merge(adapted, DERIVED[source]), changes)
    user = {key: value for key, value in zsq.items() if key not in ('presets', 'composed')}
    defaults = preset_section(source, merge(changes, user))
    plain = merge(merge(defaults, changes), dict(user, preset=preset))
    return ZsqSection.parse(plain, 'zsq'), plain


def _check_preset_changes(changes: Any, where: str) -> None:
    """Check the changes of one preset. Those of a preset that is not used are a mistake as well."""
    if isinstance(changes, str):
        _preset_name(changes, where)
    elif changes is not None and not isinstance(changes, Mapping):
        raise UserError(f'{where} is {changes!r}, but must be {describe(PresetChanges)}.')
    elif changes is not None:
        check_keys(changes, ZsqSection.model_fields, where)
        for key, value in changes.items():
            # Otherwise the value would replace a whole section, and the message would not name zsq.presets.
            if section_classes(ZsqSection.model_fields[key].annotation) and not isinstance(value, Mapping):
                raise UserError(f'{where}.{key} is {value!r}, but must be a dict.')


def _preset_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in PRESETS:
        known = ', '.join(map(repr, PRESETS))
        raise UserError(f'{where} is {name!r}, but must be one of {known}.{nearest(name, list(PRESETS))}')
    return name


def check_parts(section: Mapping[str, Any]) -> None:
    """Build label sampler, priors and distillation losses once, and look up the optimizer.

    A mistake then shows before any work.

    Args:
        section: A complete ``zsq`` section.

    Raises:
        UserError: If a type is unknown, or a class refuses its arguments.
    """
    build_part(LABEL_SAMPLERS, section['label_sampler'], 'zsq.label_sampler')
    for index, prior in enumerate(section['synthesis']['priors']):
        build_part(PRIORS, prior, f'zsq.synthesis.priors[{index}]')
    for index, loss in enumerate(section['distillation']['losses']):
        build_part(MODELS, loss, f'zsq.distillation.losses[{index}]', DistillationLoss)
    optimizer = section['train']['optimizer']['type']
    if not inspect.isclass(resolve_class(OPTIMIZERS, optimizer) if optimizer else None):
        hint = nearest(optimizer, sorted(OPTIMIZERS.module_dict)) if isinstance(optimizer, str) else ''
        raise UserError(f'zsq.train.optimizer.type is {optimizer!r}, but must be a registered optimizer.{hint}')


def compose(cfg: Config) -> Config:
    """Compose the runnable config. The argument is not changed. A composed config comes back as a copy.

    Args:
        cfg: A detector's config with a ``zsq`` section, and with ``work_dir`` unless ``zsq.calibration_set.dir`` is
            set. The teacher is ``zsq.teacher``, or ``load_from`` of a run that begins.

    Raises:
        UserError: If the section or the detector's config has a mistake, or the section of a composed config has
            changed.
    """
    cfg = with_plain_types(copy.deepcopy(cfg))
    if 'zsq' not in cfg:
        raise UserError(
            "this config has no zsq section: add a base such as 'mmzsq::_base_/zsq_w4a8.py' beside that of the detector"
        )
    if 'model' not in cfg:
        raise UserError("this config has no model: add the detector's config to _base_, beside the zsq base")
    zsq = cfg.zsq.to_dict() if isinstance(cfg.zsq, ConfigDict) else cfg.zsq
    if isinstance(zsq, Mapping) and zsq.get('composed'):
        _check_unchanged(zsq)
        return cfg
    _check_other_sections(cfg)
    check_supported(cfg.model)
    _check_normalization(cfg)
    section, plain = read_section(zsq)
    check_parts(plain)
    # With `resume`, `load_from` is the checkpoint to continue from.
    plain['teacher'] = section.teacher or (None if cfg.get('resume') else cfg.get('load_from'))
    if section.calibration_set.dir is None:
        plain['calibration_set']['dir'] = str(Path(cfg.get('work_dir') or 'work_dirs') / 'calibration_set')
    # Before the training data is replaced by the set.
    classes = class_names(cfg)
    # MMEngine's Runner would hand the preprocessor to its model, which is no longer the detector.
    if (preprocessor := cfg.pop('data_preprocessor', None)) is not None:
        cfg.model.setdefault('data_preprocessor', preprocessor)
    composed = dict(config=cfg.filename, load_from=cfg.get('load_from'), digest=_digest(plain))
    _replace(cfg, 'zsq', dict(plain, composed=composed))
    _replace(
        cfg,
        'model',
        dict(
            type=MODEL_TYPE,
            detector=cfg.model._to_lazy_dict(),
            quantizer=plain['quantizer'],
            distillation=plain['distillation'],
            teacher=plain['teacher'],
            bn=section.train.bn,
            capture=section.train.capture,
            augmentation=plain['train']['augmentation'],
            channels_last=section.train.channels_last,
            teacher_sha256=section.teacher_sha256,
        ),
    )
    max_epochs = section.train.max_epochs
    _replace(cfg, 'train_cfg', dict(type='mmzsq.ResumableTrainLoop', max_epochs=max_epochs, val_interval=10**9))
    _replace(cfg, 'train_dataloader', _train_dataloader(cfg, section, plain))
    _replace(cfg, 'optim_wrapper', _optim_wrapper(section.train, plain['train']['optimizer']))
    _replace(cfg, 'param_scheduler', _param_scheduler(section.train))
    _replace(cfg, 'model_wrapper_cfg', dict(type='mmzsq.AveragingDataParallel'))
    cfg.custom_hooks = _custom_hooks(cfg, section, plain, classes)
    if 'auto_scale_lr' in cfg:
        cfg.auto_scale_lr.enable = False
    checkpoint_hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if checkpoint_hook is not None:
        # Choosing a checkpoint by its accuracy on real images would not be zero-shot.
        checkpoint_hook.pop('save_best', None)
    if cfg.get('randomness') is None:
        cfg.randomness = dict()
    if cfg.randomness.get('seed') is None:
        cfg.randomness.seed = section.calibration_set.seed
    # Each process augments differently, and all draw from one order of the images.
    cfg.randomness.setdefault('diff_rank_seed', True)
    cfg.train_dataloader.sampler.seed = cfg.randomness.seed
    return cfg


def _check_other_sections(cfg: Config) -> None:
    """Check the form of the sections outside of ``zsq`` that :func:`compose` reads."""
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    for key in ('model', 'randomness', 'default_hooks', 'env_cfg', *loaders):
        if cfg.get(key) is not None and not isinstance(cfg[key], Mapping):
            raise UserError(f'{key} is {cfg[key]!r}, but must be a dict.')
    for key in loaders:
        dataset = (cfg.get(key) or {}).get('dataset')
        if dataset is not None and not isinstance(dataset, Mapping):
            raise UserError(f'{key}.dataset is {dataset!r}, but must be a dict.')
        metainfo = (dataset or {}).get('metainfo')
        if metainfo is not None and not isinstance(metainfo, Mapping):
            raise UserError(f'{key}.dataset.metainfo is {metainfo!r}, but must be a dict.')
    for key in ('work_dir', 'launcher'):
        if cfg.get(key) is not None and not isinstance(cfg[key], str):
            raise UserError(f'{key} is {cfg[key]!r}, but must be a string.')
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if hook is not None and not isinstance(hook, Mapping):
            raise UserError(f'default_hooks.{name} is {hook!r}, but must be a dict or None.')
    hooks = cfg.get('custom_hooks') or []
    for hook in hooks if isinstance(hooks, (list, tuple)) else [hooks]:
        if not isinstance(hook, Mapping) or 'type' not in hook:
            raise UserError(f'custom_hooks must be a list of dicts with a type, but holds {hook!r}.')
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise UserError(f'randomness.seed is {seed!r}, but must be an integer from 0 to {2**32 - 1} or None.')


def _check_normalization(cfg: Config) -> None:
    """Refuse a pipeline that normalizes: the detector would get synthetic images with other values."""
    transform = next((step for step in pipeline_of(cfg) if transform_name(step) == 'Normalize'), None)
    if transform is not None:
        raise UserError(
            f'the test pipeline normalizes images ({transform["type"]}), but synthetic images pass '
            'model.data_preprocessor alone: remove the transform from all pipelines, and set mean, std and '
            'bgr_to_rgb (its to_rgb) in model.data_preprocessor.'
        )


def _digest(section: Mapping[str, Any]) -> str:
    """SHA-256 of a section. It survives writing the section to a file and reading it again."""
    content = {key: value for key, value in section.items() if key != 'composed'}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=stable_text).encode()).hexdigest()


def _check_unchanged(section: Mapping[str, Any]) -> None:
    """Refuse a composed section that was changed: model, loader and hooks were made from the old one."""
    composed = section['composed']
    composed = composed if isinstance(composed, Mapping) else {}
    if composed.get('digest') != _digest(section):
        raise UserError(
            'this config is already composed, and changes of its zsq section would have no effect: model, loader and '
            'hooks were made from the old section. Give --cfg-options zsq.* (and --amp) with the config that was '
            f'composed{": " + composed["config"] if composed.get("config") else ""}'
        )


def _replace(cfg: Config, key: str, value: Any) -> None:
    """Set ``cfg[key]``; assigning a dict to an existing key of a Config would keep the old ConfigDict's keys."""
    cfg.pop(key, None)
    cfg[key] = ConfigDict(value) if isinstance(value, dict) else value


def detector_section(cfg: Config) -> ConfigDict:
    """Return the config of the float detector.

    Args:
        cfg: A detector's config, with or without a ``zsq`` section, or a composed one. It is not changed.
    """
    composed = isinstance(cfg.get('zsq'), Mapping) and cfg.zsq.get('composed')
    section = plain_section(cfg.model.detector if composed else cfg.model)
    # MMEngine's Runner hands it to the model likewise.
    if cfg.get('data_preprocessor') is not None:
        section.setdefault('data_preprocessor', plain_section(cfg.data_preprocessor))
    # Heads read the attributes of their test_cfg.
    return ConfigDict(section)


def drop_training_hooks(hooks: Sequence[Mapping[str, Any]] | None) -> list[Any]:
    """Return the custom hooks without those that control the training of a float detector."""
    return [
        hook
        for hook in hooks or []
        # With a scope ('mmdet.PipelineSwitchHook') or without.
        if getattr(hook['type'], '__name__', hook['type']).rsplit('.', 1)[-1] not in TRAINING_ONLY_HOOKS
    ]


def has_masks(model: Any) -> bool:
    """Return whether any part of a detector's config has a mask head or, as RTMDet-Ins in its box head, a mask loss."""
    if isinstance(model, Mapping):
        return any(key in ('mask_head', 'loss_mask') and value is not None for key, value in model.items()) or any(
            has_masks(value) for value in model.values()
        )
    return isinstance(model, (list, tuple)) and any(has_masks(part) for part in model)


def _train_dataloader(cfg: Config, section: ZsqSection, plain: Mapping[str, Any]) -> dict[str, Any]:
    train = section.train
    learns_labels = bool(section.distillation.detection_weight)
    # Only the detection loss reads masks. Decoding them takes about half as long as reading the image.
    annotations = dict(
        type='mmdet.LoadAnnotations', with_bbox=True, with_mask=learns_labels and has_masks(cfg.model.detector)
    )
    real = plain['calibration_set']['real']
    if real is not None:
        own_pipeline = real.get('pipeline') or []
        if not isinstance(own_pipeline, (list, tuple)) or not all(
            isinstance(step, Mapping) and 'type' in step for step in own_pipeline
        ):
            raise UserError(
                f'zsq.calibration_set.real.pipeline is {own_pipeline!r}, but must be a list of dicts with a type.'
            )
        # Bitmaps or polygons, as the detector's own training reads them.
        own: Mapping[str, Any] = next((step for step in own_pipeline if 'LoadAnnotations' in str(step['type'])), {})
        if 'poly2mask' in own:
            annotations['poly2mask'] = own['poly2mask']
        dataset: dict[str, Any] = dict(
            type='mmzsq.SeededDataset', dataset=dict(real, pipeline=real_pipeline(cfg, annotations))
        )
    else:
        dataset = dict(
            type='mmzsq.CalibrationDataset',
            data_root=plain['calibration_set']['dir'],
            pipeline=[
                dict(type='mmengine.LoadImageFromFile'),
                annotations,
                *_resize(train.image_size),
                dict(
                    type='mmdet.PackDetInputs',
                    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                ),
            ],
        )
    return dict(
        batch_size=train.batch_size,
        num_workers=train.num_workers,
        persistent_workers=train.num_workers > 0,
        # A resumed training repeats the random transforms of real images. Synthetic ones have none here.
        sampler=dict(type='mmengine.DefaultSampler' if real is None else 'mmzsq.SeededSampler', shuffle=True),
        # Only the detection loss reads labels.
        collate_fn=dict(type='mmzsq.stack_images', labels=learns_labels),
        dataset=dataset,
    )


def _resize(image_size: int | tuple[int, int] | None) -> list[dict[str, Any]]:
    if image_size is None:
        return []
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return [dict(type='mmdet.Resize', scale=(width, height), keep_ratio=False)]


def real_pipeline(cfg: Config, annotations: dict[str, Any]) -> list[dict[str, Any]]:
    """Make the pipeline of real images: the detector's test pipeline, with labels loaded after the image.

    Args:
        cfg: Config of the detector.
        annotations: Transform that loads the labels. Geometric transforms after it also transform them.

    Raises:
        UserError: If the config has no test pipeline.
    """
    pipeline = ((cfg.get('test_dataloader') or {}).get('dataset') or {}).get('pipeline')
    if not pipeline:
        raise UserError(
            'zsq.calibration_set.real uses the test pipeline of the detector, but this config has no '
            'test_dataloader.dataset.pipeline'
        )
    load, *others = [dict(step) for step in pipeline if 'LoadAnnotations' not in step['type']]
    return [load, annotations, *others]


def _optim_wrapper(train: TrainConfig, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    # MMEngine's constructor wants a base decay where single parameters have none.
    optimizer = dict(dict(weight_decay=0.0), **optimizer)
    multiplier = 1.0 if train.step_lr is None else train.step_lr / train.optimizer.lr
    wrapper = dict(
        type='mmengine.AmpOptimWrapper' if train.amp else 'mmengine.OptimWrapper',
        constructor='mmzsq.GroupedOptimWrapperConstructor',
        optimizer=optimizer,
        accumulative_counts=train.accumulate,
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            bias_decay_mult=0.0,
            weight_size=train.weight_size,
            # Input factors are part of the grid, as steps are.
            custom_keys={key: dict(lr_mult=multiplier, decay_mult=0.0) for key in ('_quantizer.', '.log_input_scale')},
        ),
    )
    if train.amp:
        wrapper['dtype'] = 'bfloat16'
    if train.clip_grad is not None:
        wrapper['clip_grad'] = dict(max_norm=train.clip_grad, norm_type=2)
    return wrapper


def _param_scheduler(train: TrainConfig) -> list[dict[str, Any]]:
    if not train.max_epochs:
        return []
    common = dict(begin=0, end=train.max_epochs, by_epoch=True, convert_to_iter_based=True)
    if train.schedule == 'cosine':
        return [
            dict(
                type='mmengine.CosineAnnealingLR',
                T_max=train.max_epochs,
                eta_min_ratio=train.final_lr_ratio,
                **common,
            )
        ]
    if train.schedule == 'linear':
        return [dict(type='mmengine.LinearLR', start_factor=1.0, end_factor=train.final_lr_ratio, **common)]
    return []


def _custom_hooks(
    cfg: Config, section: ZsqSection, plain: Mapping[str, Any], classes: list[str] | None
) -> list[dict[str, Any]]:
    kept = drop_training_hooks(cfg.get('custom_hooks'))
    generate = dict(
        type='mmzsq.CalibrationSetHook',
        root=plain['calibration_set']['dir'],
        num_images=section.calibration_set.num_images,
        batch_size=section.calibration_set.batch_size,
        seed=section.calibration_set.seed,
        synthesis=plain['synthesis'],
        label_sampler=plain['label_sampler'],
        classes=classes,
        source=section.calibration_set.source,
        # Only the detection loss reads labels.
        label_pictures=bool(section.distillation.detection_weight),
    )
    own: list[dict[str, Any]] = [
        *([generate] if section.calibration_set.real is None else []),
        dict(
            type='mmzsq.QuantizerInitHook',
            num_batches=section.train.init_batches,
            reconstruction=None if section.reconstruction is None else section.reconstruction.model_dump(),
        ),
        dict(type='mmzsq.FiniteLossHook'),
    ]
    if section.train.ema is not None and section.train.max_epochs:
        # As in YOLOv5, the average follows closely at first and reaches its momentum after about 2000 steps.
        batches = section.train.accumulate
        own.append(
            dict(
                type='mmengine.EMAHook',
                ema_type='mmdet.ExpMomentumEMA',
                momentum=1 - section.train.ema,
                gamma=2000 * batches,
                interval=batches,
                update_buffers=True,
            )
        )
    return [*kept, *own]


def class_names(cfg: Config) -> list[str] | None:
    """Return the class names that the config's data sets declare, see :func:`mmzsq.class_names.declared_classes`."""
    return declared_classes(cfg)
