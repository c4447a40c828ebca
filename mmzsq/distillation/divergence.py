# SPDX-License-Identifier: Apache-2.0
"""Divergences and errors between tensors of a student and a teacher, shared by the distillation losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmzsq.update_parts import part_count, row_counts, row_shares, update_mean


def kl_divergence(preds_S: Tensor, preds_T: Tensor, tau: float) -> Tensor:
    """Temperature-scaled KL divergence of softmax distributions, summed over the last dimension.

    ``tau**2 * KL(softmax(preds_T / tau) || softmax(preds_S / tau))``, computed in fp32.

    Args:
        preds_S: Logits of the student, (..., K).
        preds_T: Logits of the teacher, (..., K).
        tau: Temperature.

    Returns:
        Shape (...).
    """
    log_student = F.log_softmax(preds_S.float() / tau, dim=-1)
    log_teacher = F.log_softmax(preds_T.float() / tau, dim=-1)
    return tau**2 * F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(-1)


def binary_kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Elementwise KL divergence of Bernoulli distributions given by logits; 0 where the logits are equal.

    Args:
        logits: Logits of the student, any shape.
        target_logits: Logits of the teacher, the same shape.

    Example:
        >>> binary_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        tensor([0.0000, 0.1201])
    """
    target = target_logits.sigmoid()
    return F.binary_cross_entropy_with_logits(logits, target, reduction='none') - (
        F.binary_cross_entropy_with_logits(target_logits, target, reduction='none')
    )


def soft_object_count(scores: Tensor) -> Tensor:
    """Soft number of objects in a batch: the sum of the teacher's scores, at least 1; a scalar.

    If the images of an update come in several parts (processes, accumulated batches), each part gets the mean of the
    sums of all parts, at least 1 / number of parts. The mean of the gradients over the parts then equals the gradient
    of one batch with all images.

    Args:
        scores: The teacher's probabilities of an object, any shape, without gradient.
    """
    return update_mean(scores.sum()).clamp(min=1 / part_count())


def relative_errors(errors: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
    """Divide mean squared errors by the mean square of the teacher's tensors.

    The mean squares are averaged over all parts of the update, in one exchange. They are at least 1e-12.

    Args:
        errors: K mean squared errors, scalars.
        teacher: The K tensors of the teacher, any shapes.
        rows: Numbers of rows from :func:`row_counts_of`, (K,) or (1,).

    Returns:
        Shape (K,).

    Example:
        >>> relative_errors([torch.tensor(1.0)], [torch.tensor([2.0, 2.0])])
        tensor([0.2500])
    """
    squares = torch.stack([t.float().square().mean() for t in teacher])
    if rows is None:
        return torch.stack(list(errors)) / update_mean(squares).clamp(min=1e-12)
    # Sums over rows, since a mean must not depend on another mean.
    return torch.stack(list(errors)) * rows / update_mean(squares * rows).clamp(min=1e-12)


def row_counts_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the number of rows of each tensor, see :func:`~mmzsq.update_parts.row_counts`.

    Args:
        tensors: K tensors with a row for each image or region, on one device.
    """
    return row_counts([len(tensor) for tensor in tensors], tensors[0].device)


def row_shares_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the shares of the rows of each tensor, see :func:`~mmzsq.update_parts.row_shares`.

    Args:
        tensors: K tensors with a row for each image or region, on one device.
    """
    return row_shares([len(tensor) for tensor in tensors], tensors[0].device)
