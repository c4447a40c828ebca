# SPDX-License-Identifier: Apache-2.0
"""Config of a rehearsal: all stages of a run at toy size, in a folder of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError
from mmzsq.quantization.config import AllocationSettings
from mmzsq.synthesis.default_sizes import stages_of

FOLDER = 'rehearsal'
"""Folder of a rehearsal in the work_dir."""

IMAGES = 4
TRAIN_BATCH = 2
EVALUATION_IMAGES = 2

ITERATIONS = dict(relabel=12, refine=4, synthesize=6)
"""Largest number of steps of each stage of synthesis."""

RELABEL_STEPS = 4
"""Largest warm-up of the label sampler, and steps between two corrections of labels."""

TRAIN_SIDE = 160
"""Longer side in pixels of training images that ``zsq.train.image_size`` resizes."""


def rehearsal_config(cfg: Config) -> Config:
    """Shrink a config to a rehearsal of its run.

    Stages, losses, quantizers and the evaluation stay those of the run. The number of images, batches, steps and
    candidate bits are small, and everything is written to ``WORK_DIR/rehearsal``. Sizes of the images are left open:
    :func:`~mmzsq.engine.rehearsal.rehearse` chooses the smallest that the detector takes.

    Args:
        cfg: A detector's config with a ``zsq`` section and a ``work_dir``. It is not changed.

    Returns:
        The config, not yet composed.

    Raises:
        UserError: If the section has a mistake, or there is nothing to rehearse.
    """
    cfg = copy.deepcopy(cfg)
    if 'zsq' not in cfg:
        raise UserError(
            "--rehearse is for configs with a zsq section: add a base such as 'mmzsq::_base_/zsq_w4a8.py' beside that "
            'of the detector'
        )
    if isinstance(cfg.zsq, Mapping) and cfg.zsq.get('composed'):
        raise UserError('--rehearse takes the config that was composed, not the composed one in a work_dir')
    if cfg.get('launcher', 'none') != 'none':
        raise UserError('--rehearse takes one process: start it without a launcher')
    section = complete_section(cfg.zsq.to_dict() if isinstance(cfg.zsq, ConfigDict) else cfg.zsq)
    if section['calibration_set']['real'] is not None:
        raise UserError('--rehearse makes synthetic images: remove zsq.calibration_set.real')
    folder = Path(cfg.work_dir) / FOLDER
    cfg.work_dir = str(folder)
    cfg.pop('zsq')
    cfg.zsq = ConfigDict(_shrink(section, folder))
    _keep_to_folder(cfg, folder)
    for loader in ('val_dataloader', 'test_dataloader'):
        if cfg.get(loader) is not None:
            cfg[loader].pop('sampler', None)
            cfg[loader].sampler = ConfigDict(type='mmzsq.FirstImages', count=EVALUATION_IMAGES)
    return cfg


def _shrink(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    section = copy.deepcopy(section)
    section['calibration_set'].update(dir=str(folder / 'calibration_set'), num_images=IMAGES, batch_size=IMAGES)
    sampler, synthesis, train = section['label_sampler'], section['synthesis'], section['train']
    for key in ('warmup', 'interval'):
        if isinstance(sampler.get(key), int):
            sampler[key] = min(sampler[key], RELABEL_STEPS)
    for name, stage in stages_of(synthesis):
        stage.update(image_size=None, batch_size=IMAGES, iterations=min(stage['iterations'], ITERATIONS[name]))
    synthesis.update(fit_batches=False, warmup=min(synthesis['warmup'], RELABEL_STEPS))
    train.update(
        max_epochs=min(train['max_epochs'], 1),
        batch_size=min(train['batch_size'], TRAIN_BATCH),
        accumulate=min(train['accumulate'], IMAGES // TRAIN_BATCH),
        init_batches=1,
    )
    if train['image_size'] is not None:
        size = train['image_size']
        sides = (size, size) if isinstance(size, int) else tuple(size)
        # Multiples of 32, as strides of detectors ask for.
        train['image_size'] = tuple(max(round(side * TRAIN_SIDE / max(sides) / 32), 1) * 32 for side in sides)
    allocate = section['quantizer'].get('allocate')
    if allocate is not None:
        # The fewest bits keep any budget that the run keeps.
        candidates = allocate.get('candidates') or AllocationSettings().candidates
        section['quantizer']['allocate'] = dict(
            allocate, candidates=sorted({min(candidates), max(candidates)}), batches=1
        )
    return section


def _keep_to_folder(cfg: Config, folder: Path) -> None:
    """Redirect what a config writes elsewhere: checkpoints, results of metrics, and logs of other services."""
    hooks = cfg.get('default_hooks') or {}
    if hooks.get('checkpoint') is not None:
        hooks['checkpoint'].pop('out_dir', None)
        hooks['checkpoint'].interval = 1
    if hooks.get('logger') is not None:
        hooks['logger'].pop('out_dir', None)
        hooks['logger'].interval = 1
    for metric in _metrics(cfg):
        if metric.get('outfile_prefix') is not None:
            metric['outfile_prefix'] = str(folder / 'metrics')
    for section in (cfg.get('visualizer'), cfg):
        if section is not None and section.get('vis_backends') is not None:
            section['vis_backends'] = [ConfigDict(type='LocalVisBackend')]


def _metrics(cfg: Config) -> Iterator[Any]:
    for name in ('val_evaluator', 'test_evaluator'):
        found = cfg.get(name)
        yield from (found if isinstance(found, (list, tuple)) else [found] if isinstance(found, Mapping) else [])
