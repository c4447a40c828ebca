# SPDX-License-Identifier: Apache-2.0
"""Learned rounding of a weight: each value goes to the level below or above it, whichever serves the output better.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, https://arxiv.org/abs/2004.10568,
equations 21 to 24. A value is ``step * clip(floor(w / step) + h, qmin, qmax)``, where h in [0, 1] is a stretched
sigmoid of a learned variable. A regularizer drives each h to 0 or 1 until the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmzsq.quantization.quantizers import LSQ

LOW, HIGH = -0.1, 1.1
"""Range of the stretched sigmoid before it is clipped to [0, 1], so that it reaches both ends."""


class AdaptiveRounding(nn.Module):
    """The rounding of one weight. It starts as the weight itself, unrounded.

    Args:
        quantizer: Initialized quantizer of the weight. Its steps stay as they are.
        filters: Weight as the quantizer sees it, (C_out, ...).
    """

    floor: Tensor
    step: Tensor

    def __init__(self, quantizer: LSQ, filters: Tensor) -> None:
        super().__init__()
        filters = filters.detach()
        self.qmin, self.qmax = quantizer.qmin, quantizer.qmax
        step = quantizer.step.detach().view((quantizer.num_steps,) + (1,) * (filters.dim() - 1))
        levels = filters.float() / step
        self.register_buffer('step', step)
        self.register_buffer('floor', levels.floor())
        share = (levels - self.floor - LOW) / (HIGH - LOW)
        self.variable = nn.Parameter(share.logit())

    def upward(self) -> Tensor:
        """Return h, the part of a step that each value lies above the lower level, in [0, 1]."""
        return (torch.sigmoid(self.variable) * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self, filters: Tensor) -> Tensor:
        """Return the softly rounded weight in the shape and type of ``filters``, whose values are not read."""
        return ((self.floor + self.upward()).clamp(self.qmin, self.qmax) * self.step).to(filters.dtype)

    def rounded(self) -> Tensor:
        """Return the weight on its grid, (C_out, ...) fp32."""
        upward = (self.variable.detach() >= 0).float()
        return (self.floor + upward).clamp(self.qmin, self.qmax) * self.step

    def penalty(self, exponent: float) -> Tensor:
        """Return the regularizer, the mean of ``1 - |2h - 1|^exponent``: 0 if every value is at a level.

        Args:
            exponent: Large values act on h near 0 or 1 alone, small ones on all.
        """
        return 1 - (2 * self.upward() - 1).abs().pow(exponent).mean()
