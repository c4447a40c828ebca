# SPDX-License-Identifier: Apache-2.0
"""Hooks of zero-shot quantization."""

from mmzsq.engine.hooks.calibration_set_hook import CalibrationSetHook
from mmzsq.engine.hooks.finite_loss_hook import FiniteLossHook
from mmzsq.engine.hooks.float_checkpoint_hook import FloatCheckpointHook
from mmzsq.engine.hooks.quantizer_init_hook import QuantizerInitHook

__all__ = ['CalibrationSetHook', 'FiniteLossHook', 'FloatCheckpointHook', 'QuantizerInitHook']
