# SPDX-License-Identifier: Apache-2.0
"""Hook that checks the checkpoint of a float detector before it is evaluated."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmzsq.checkpoint import check_structure
from mmzsq.qat.teacher import full_precision_weights
from mmzsq.registry import HOOKS


@HOOKS.register_module()
class FloatCheckpointHook(Hook):
    """Refuses a checkpoint that does not have every weight of the detector, of which MMEngine would load what fits."""

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check the weights, and store them under the names of the detector.

        Args:
            runner: The runner with the float detector.
            checkpoint: The loaded checkpoint, changed in place.

        Raises:
            UserError: If a weight is missing, does not fit or is left over, or if the checkpoint is quantized.
        """
        name = str(runner._load_from or 'the checkpoint')
        check_structure(checkpoint, name)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint['state_dict'] = full_precision_weights(
            model,
            checkpoint,
            name,
            'Give the config that it was trained with, whose zsq section describes the quantizers',
        )
