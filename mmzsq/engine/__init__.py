# SPDX-License-Identifier: Apache-2.0
"""Runner, hooks and optimizer constructor of zero-shot quantization on MMEngine."""

from mmzsq.engine.distributed import AveragingDataParallel
from mmzsq.engine.exported_detector import check_classes, evaluation_config, exported_detector
from mmzsq.engine.hooks import CalibrationSetHook, FiniteLossHook, QuantizerInitHook
from mmzsq.engine.optim_wrapper_constructor import GroupedOptimWrapperConstructor
from mmzsq.engine.runner import ZeroShotRunner
from mmzsq.engine.train_loop import ResumableTrainLoop

__all__ = [
    'AveragingDataParallel',
    'CalibrationSetHook',
    'FiniteLossHook',
    'GroupedOptimWrapperConstructor',
    'QuantizerInitHook',
    'ResumableTrainLoop',
    'ZeroShotRunner',
    'check_classes',
    'evaluation_config',
    'exported_detector',
]
