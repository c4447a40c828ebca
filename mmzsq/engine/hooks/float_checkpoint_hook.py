# SPDX-License-Identifier: Apache-2.0
"""Hook that checks the checkpoint of a float detector before it is evaluated."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmzsq.checkpoint import check_structure
from mmzsq.class_names import check_built_dataset, choose_classes
from mmzsq.config.compose import class_names
from mmzsq.qat.teacher import full_precision_weights
from mmzsq.registry import HOOKS
from mmzsq.tasks.detection_task import known_num_classes


@HOOKS.register_module()
class FloatCheckpointHook(Hook):
    """Refuses a checkpoint with other weights or class names than the config.

    MMEngine would load what fits and leave the other weights random.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.classes: list[str] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check class names and weights, and store the weights under the names of the detector.

        Args:
            runner: The runner with the float detector.
            checkpoint: The loaded checkpoint, changed in place.

        Raises:
            UserError: If class names differ, a weight is missing, does not fit or is left over, or the checkpoint is
                quantized.
        """
        name = str(runner._load_from or 'the checkpoint')
        check_structure(checkpoint, name)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        meta = checkpoint.get('meta') or {}
        self.classes = choose_classes(class_names(runner.cfg), meta, known_num_classes(model), name)
        checkpoint['state_dict'] = full_precision_weights(
            model,
            checkpoint,
            name,
            'Give the config that it was trained with, whose zsq section describes the quantizers',
        )

    def before_test(self, runner: Runner) -> None:
        """Compare the class names of the data with those of the detector.

        Args:
            runner: The runner with the loaded detector.

        Raises:
            UserError: If they differ.
        """
        check_built_dataset(runner.test_loop.dataloader.dataset, self.classes, 'test_dataloader.dataset')
