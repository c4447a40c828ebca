# SPDX-License-Identifier: Apache-2.0
"""Divergences and errors between tensors of a student and a teacher, shared by the distillation losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from torch import Tensor


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

    In distributed training each process gets the mean of the sums of all processes, at least 1 / world size. The mean
    of the gradients over the processes then equals the gradient of one process that sees all images.

    Args:
        scores: The teacher's probabilities of an object, any shape, without gradient.
    """
    return reduce_mean(scores.sum()).clamp(min=1 / get_world_size())


def relative_errors(errors: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Divide mean squared errors by the mean square of the teacher's tensors.

    The mean squares are averaged over all processes, in one exchange. They are at least 1e-12.

    Args:
        errors: K mean squared errors, scalars.
        teacher: The K tensors of the teacher, any shapes.

    Returns:
        Shape (K,).

    Example:
        >>> relative_errors([torch.tensor(1.0)], [torch.tensor([2.0, 2.0])])
        tensor([0.2500])
    """
    squares = reduce_mean(torch.stack([t.float().square().mean() for t in teacher]))
    return torch.stack(list(errors)) / squares.clamp(min=1e-12)
