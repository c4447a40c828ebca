# SPDX-License-Identifier: Apache-2.0
"""Evaluation of exported files by MMEngine's Runner, on the data and with the metrics of a config."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from mmzsq.config.compose import detector_section, drop_training_hooks
from mmzsq.config.plain_types import with_plain_types
from mmzsq.errors import UserError
from mmzsq.registry import MODELS

TRAINING_KEYS = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler')


@MODELS.register_module()
def exported_detector(path: str, detector: Mapping[str, Any], runtime: str | None = None, threads: int = 0) -> Any:
    """Build the detector that runs an exported file, see :func:`~mmzsq.deploy.predictor.detector_of`.

    Args:
        path: The main file.
        detector: Config of the float detector.
        runtime: ``'onnxruntime'`` or ``'openvino'``; by default that of the file's target.
        threads: Number of threads; 0 lets the runtime decide.
    """
    # Deployment is an extra.
    from mmzsq.deploy import detector_of

    return detector_of(path, detector, runtime, threads)


def evaluation_config(cfg: Config, path: str, runtime: str | None = None, threads: int = 0) -> Config:
    """Make the config that evaluates an exported file.

    Args:
        cfg: Config of the detector, with or without a ``zsq`` section, or a composed one. It is not changed.
        path: The main file.
        runtime: As of :func:`exported_detector`.
        threads: As of :func:`exported_detector`.

    Returns:
        A config for MMEngine's Runner with ``cfg``'s test data and metrics, and without what trains.

    Raises:
        UserError: If the file is missing, was not written by this package, or cannot run in the runtime.
    """
    from mmzsq.deploy import runtime_for

    runtime = runtime_for(path, runtime)
    section = detector_section(cfg)
    cfg = with_plain_types(copy.deepcopy(cfg))
    if cfg.pop('zsq', None) is not None:
        # The runner and the model wrapper of the section are for teacher and student.
        cfg.runner_type = 'Runner'
        cfg.pop('model_wrapper_cfg', None)
    for key in ('model', 'data_preprocessor', *TRAINING_KEYS):
        cfg.pop(key, None)
    cfg.model = ConfigDict(
        type='mmzsq.exported_detector', path=path, detector=section, runtime=runtime, threads=threads
    )
    # Hooks of this package train a student.
    cfg.custom_hooks = [
        hook for hook in drop_training_hooks(cfg.get('custom_hooks')) if not str(hook['type']).startswith('mmzsq.')
    ]
    cfg.load_from, cfg.resume = None, False
    return cfg


def check_classes(path: str, of_data: Sequence[str] | None) -> None:
    """Refuse a data set with other classes than those in the metadata of a file.

    Args:
        path: The main file.
        of_data: Class names of the data set, None if it declares none.

    Raises:
        UserError: Names the first class that differs.
    """
    from mmzsq.deploy import read_metadata

    exported = json.loads(read_metadata(path)['classes'])
    if exported is None or of_data is None or tuple(exported) == tuple(of_data):
        return
    if len(exported) != len(of_data):
        difference = f'{len(exported)} classes, but the test data of the config have {len(of_data)}'
    else:
        index = next(i for i, (a, b) in enumerate(zip(exported, of_data, strict=True)) if a != b)
        difference = f'{exported[index]!r} as class {index}, but the test data of the config have {of_data[index]!r}'
    raise UserError(
        f'{path} was exported with {difference}: evaluate it with the config that it was exported with, or set '
        'test_dataloader.dataset.metainfo.classes.'
    )
