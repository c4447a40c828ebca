# SPDX-License-Identifier: Apache-2.0
"""Leaves a random part of the values unquantized while the student trains, less and less of them.

After Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", 2022,
https://arxiv.org/abs/2203.05740 (activations), and Fan et al., "Training with Quantization Noise for Extreme Model
Compression", 2020, https://arxiv.org/abs/2004.07320 (weights): what is learnt fits more than the few images seen.
Neither lets the part shrink; here all is quantized at the end, as it will be in use, and the steps are learnt for that.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.quantization import quantizers
from mmzsq.registry import HOOKS


@HOOKS.register_module()
class QuantizationDropHook(Hook):
    """Sets the part of the values that quantizers leave as they are, before each step.

    Args:
        activations: Part of the inputs of layers at the start, 0 to 1.
        weights: Part of the weights at the start, 0 to 1.
        until: Where in training, from 0 to 1, the part has shrunk to nothing, along a line.

    Raises:
        UserError: If a number is out of its range.
    """

    def __init__(self, activations: float = 0.0, weights: float = 0.0, until: float = 0.5) -> None:
        for name, value in dict(activations=activations, weights=weights, until=until).items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UserError(f'zsq.train.drop.{name} is a number from 0 to 1, not {value!r}')
        self.first = dict(activations=activations, weights=weights)
        self.until = until
        self.parts: dict[str, Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Hand each quantizer the number that it shares with all of its kind; a captured step reads it in place."""
        device = next(runner.detector.student.parameters()).device
        self.parts = {kind: torch.zeros((), device=device) for kind, first in self.first.items() if first}
        for name, quantizer in quantizers(runner.detector.student):
            kind = 'weights' if name.endswith('weight_quantizer') else 'activations'
            quantizer.drop = self.parts.get(kind)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Shrink the parts."""
        progress = runner.iter / runner.max_iters
        left = max(0.0, 1 - progress / self.until) if self.until else 0.0
        for kind, part in self.parts.items():
            part.fill_(self.first[kind] * left)

    def after_train(self, runner: Runner) -> None:
        """Quantize all again, whatever mode the student is in."""
        for _, quantizer in quantizers(runner.detector.student):
            quantizer.drop = None
