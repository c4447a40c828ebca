# SPDX-License-Identifier: Apache-2.0
"""Base classes of the distillation losses between a full-precision teacher and its quantized student."""

from __future__ import annotations

from torch import Tensor, nn

from mmzsq.argument_checks import checked_number

Outputs = dict[str, list[Tensor]]
"""Recorded outputs of the modules of one detector, by module name."""


class DistillationLoss(nn.Module):
    """A loss over the recorded outputs of teacher and student.

    Args:
        loss_weight: Factor of the loss, at least 0.

    Raises:
        UserError: If the weight is not such a number.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = checked_number(f'{type(self).__name__}: loss_weight', loss_weight, 0)

    def resolve(self, detector: nn.Module) -> DistillationLoss:
        """Return the loss to use for ``detector``: this loss, unless a subclass chooses another one."""
        return self

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the modules of ``detector`` whose outputs :meth:`forward` reads.

        Raises:
            UserError: If the loss does not support ``detector``.
        """
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Outputs of the student, by module name.
            teacher: Outputs of the teacher on the same images, without gradient.
            detector: The student. Its heads know how to decode their outputs.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the weight."""
        return f'loss_weight={self.loss_weight}'


class WeightedTermsLoss(DistillationLoss):
    """A distillation loss that is a weighted sum of several terms.

    Args:
        loss_weight: Factor of the whole loss.
        weights: Factor of each term, at least 0, by the name that :meth:`extra_repr` shows.
    """

    def __init__(self, loss_weight: float, **weights: float) -> None:
        super().__init__(loss_weight)
        self.weights = {
            name: checked_number(f'{type(self).__name__}: weight of {name}', weight, 0)
            for name, weight in weights.items()
        }

    def extra_repr(self) -> str:
        """Show all weights."""
        return ', '.join([super().extra_repr(), *(f'{name}={weight}' for name, weight in self.weights.items())])
