# SPDX-License-Identifier: Apache-2.0
"""Feature-level distillation (paper, section 3.3, eq. 7), and the default choice of features to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmzsq.argument_checks import checked_flag, checked_patterns
from mmzsq.distillation.base import DistillationLoss, Outputs
from mmzsq.distillation.divergence import relative_errors, row_counts_of, row_shares_of
from mmzsq.distillation.prediction_kl import IMAGE_MASK_HEAD
from mmzsq.errors import UserError
from mmzsq.module_patterns import select_modules
from mmzsq.registry import MODELS

FEATURE_PARTS = ('backbone', 'neck', 'encoder')
"""Attributes of MMDetection's detectors that turn images into feature maps."""

ROI_PREFIX = 'roi_head.'
"""Prefix of the names of modules that see regions instead of images."""


@MODELS.register_module()
class FeatureMSELoss(DistillationLoss):
    """Mean squared error of feature maps, averaged over layers (paper, eq. 7).

    If the network modifies the output of a layer in place, as an in-place ReLU after BatchNorm does, the modified
    output is compared.

    Args:
        modules: Patterns of module names, see :mod:`mmzsq.module_patterns`. By default
            :func:`feature_modules` chooses the modules.
        loss_weight: Factor of the loss.
        normalize: Whether to divide the error of each layer by the mean square of the teacher's features. Layers with
            large activations then do not dominate the loss.

    Raises:
        UserError: If an argument is not allowed.
    """

    def __init__(
        self, modules: Sequence[str] | str | None = None, loss_weight: float = 1.0, normalize: bool = False
    ) -> None:
        super().__init__(loss_weight)
        name = type(self).__name__
        self.patterns = checked_patterns(f'{name}: modules', modules)
        self.normalize = checked_flag(f'{name}: normalize', normalize)

    def taps(self, detector: nn.Module) -> list[str]:
        """Return the names of the compared modules.

        Raises:
            UserError: If a pattern matches no module, or no features are found by default.
        """
        return feature_modules(detector) if self.patterns is None else select_modules(detector, self.patterns)

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            student: Features of the student by module name: any number of tensors of any shape for each module, such as
                (N, C, H, W). Modules that this loss does not compare are ignored.
            teacher: Features of the teacher on the same images, the same shapes, without gradient.
            detector: The student, whose module names the patterns select.
        """
        pairs = [
            pair
            for name, features in teacher.items()
            if name in self._names(detector)
            for pair in zip(student[name], features, strict=True)
        ]
        mean_squared_errors = [mean_squared_error(s, t) for s, t in pairs]
        # All features have one row for each image.
        images = [pairs[0][1]]
        if self.normalize:
            errors = relative_errors(mean_squared_errors, [t for _, t in pairs], row_counts_of(images))
        else:
            errors, shares = torch.stack(mean_squared_errors), row_shares_of(images)
            errors = errors if shares is None else errors * shares
        return self.loss_weight * errors.mean()

    def extra_repr(self) -> str:
        """Show the weight and whether errors are normalized."""
        return f'{super().extra_repr()}, normalize={self.normalize}'

    def _names(self, detector: nn.Module) -> set[str]:
        if not hasattr(self, '_tapped'):
            self._tapped = set(self.taps(detector))
        return self._tapped


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error in fp32, a scalar.

    No fp32 copy of 16-bit features is kept for backward.

    Args:
        student: Features of any shape and dtype.
        teacher: Features of the same shape. They get no gradient.
    """
    return _MeanSquaredError.apply(student, teacher)


class _MeanSquaredError(torch.autograd.Function):
    """Saves the features themselves, which the networks hold anyway, and converts them to fp32 again in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        return F.mse_loss(student.float(), teacher.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        difference = student.float() - teacher.float()
        return (difference * (2 / difference.numel()) * grad).to(student.dtype), None


def feature_modules(detector: nn.Module) -> list[str]:
    """Return the names of the modules to compare by default, in order of registration.

    * every BatchNorm outside the RoI head;
    * every transformer block (:func:`transformer_blocks`) of :data:`FEATURE_PARTS`;
    * a whole part of :data:`FEATURE_PARTS` that contains neither;
    * if a mask head stands beside a box head, the children of the mask head: they see images, while the head as a whole
      sees the locations that the box head selects.

    Args:
        detector: Any detector.

    Raises:
        UserError: If the detector has none of these.
    """
    names = {
        name
        for name, module in detector.named_modules()
        if isinstance(module, _BatchNorm) and not name.startswith(ROI_PREFIX)
    }
    for part in FEATURE_PARTS:
        module = getattr(detector, part, None)
        if isinstance(module, nn.Module):
            names.update(f'{part}.{name}' for name in transformer_blocks(module))
            if not any(name.startswith(f'{part}.') for name in names):
                names.add(part)
    mask_head = getattr(detector, IMAGE_MASK_HEAD, None)
    if isinstance(mask_head, nn.Module) and hasattr(detector, 'bbox_head'):
        names.update(
            f'{IMAGE_MASK_HEAD}.{name}' for name, part in mask_head.named_children() if _count_weighted_layers(part)
        )
    if not names:
        raise UserError(
            f'{type(detector).__name__} has neither BatchNorm nor backbone or neck: name the modules to compare in '
            "FeatureMSELoss, modules=['...']"
        )
    return [name for name, _ in detector.named_modules() if name in names]


def transformer_blocks(model: nn.Module) -> list[str]:
    """Return the names of the transformer blocks of ``model``, in order of registration.

    An attention module is an innermost module with an attribute ``num_heads`` or ``num_attention_heads``. Its block is
    the smallest module around it that also contains the feed-forward network: at least two linear layers or
    convolutions outside the attention module.

    Args:
        model: Any network.
    """
    modules = dict(model.named_modules())
    heads = [n for n, m in modules.items() if hasattr(m, 'num_heads') or hasattr(m, 'num_attention_heads')]
    blocks: set[str] = set()
    for attention in heads:
        if any(other.startswith(f'{attention}.') for other in heads):
            continue
        around = attention
        while '.' in around:
            around = around.rpartition('.')[0]
            if _count_weighted_layers(modules[around]) - _count_weighted_layers(modules[attention]) >= 2:
                blocks.add(around)
                break
    return [name for name in modules if name in blocks]


def _count_weighted_layers(module: nn.Module) -> int:
    return sum(isinstance(child, nn.Linear | _ConvNd) for child in module.modules())
