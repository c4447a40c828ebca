# SPDX-License-Identifier: Apache-2.0
"""Feature-level distillation (paper, section 3.3, eq. 7), and which features of a detector it compares by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmzsq.distillation.losses import MASK_HEAD, DistillationLoss, Outputs
from mmzsq.errors import UserError
from mmzsq.module_patterns import select_modules
from mmzsq.registry import MODELS

FEATURE_PARTS = ('backbone', 'neck', 'encoder')
"""Attributes of MMDetection's detectors that turn images into feature maps."""

ROI_PART = 'roi_head.'
"""Prefix of modules that see regions instead of images."""


@MODELS.register_module()
class FeatureMSELoss(DistillationLoss):
    """The paper's eq. 7: mean squared difference of feature maps, averaged over layers.

    A layer whose output the network goes on to change in place, such as BatchNorm before an in-place ReLU, is compared
    as it is afterwards.

    Args:
        modules: Patterns of the modules whose outputs are compared, see :mod:`mmzsq.module_patterns`; None: found on
            the detector by :func:`feature_modules`.
        loss_weight: Factor of the loss.
        normalize: Whether each layer's error is divided by the mean square of the teacher's features, so that layers of
            large activations do not outweigh the others.
    """

    def __init__(self, modules: Sequence[str] | None = None, loss_weight: float = 1.0, normalize: bool = False) -> None:
        super().__init__(loss_weight)
        self.patterns = [modules] if isinstance(modules, str) else modules
        self.normalize = normalize

    def taps(self, detector: nn.Module) -> list[str]:
        """The modules that the patterns select."""
        return feature_modules(detector) if self.patterns is None else select_modules(detector, self.patterns)

    def forward(self, student: Outputs, teacher: Outputs, detector: nn.Module) -> Tensor:
        """Return the weighted loss, a scalar."""
        pairs = [
            pair
            for name, features in teacher.items()
            if name in self._names(detector)
            for pair in zip(student[name], features, strict=True)
        ]
        errors = torch.stack([mean_squared_error(s, t) for s, t in pairs])
        if self.normalize:
            # Of the images of all processes, in one call.
            squares = reduce_mean(torch.stack([t.float().square().mean() for _, t in pairs]))
            errors = errors / squares.clamp(min=1e-12)
        return self.loss_weight * errors.mean()

    def extra_repr(self) -> str:
        """Weight and whether errors are relative."""
        return f'{super().extra_repr()}, normalize={self.normalize}'

    def _names(self, detector: nn.Module) -> set[str]:
        if not hasattr(self, '_tapped'):
            self._tapped = set(self.taps(detector))
        return self._tapped


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference in fp32, a scalar; of 16-bit features no fp32 copy outlives the call.

    Args:
        student: Features of any shape and type.
        teacher: Likewise; gets no gradient.
    """
    return _MeanSquaredError.apply(student, teacher)


class _MeanSquaredError(torch.autograd.Function):
    """Keeps the features as they are, which the networks hold anyway, and converts them again in backward."""

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
    """Names of the modules whose outputs tell most of what a detector sees, in order of registration.

    Every BatchNorm, and every transformer block (:func:`transformer_blocks`) of :data:`FEATURE_PARTS`. A part with
    neither inside is compared by what it returns. So are the parts of a mask head beside a box head: the whole head
    sees what that one picks, they see images. Modules of a RoI head are left out.

    Args:
        detector: Any detector.

    Raises:
        UserError: If it has none of these, nor backbone or neck.
    """
    names = {
        name
        for name, module in detector.named_modules()
        if isinstance(module, _BatchNorm) and not name.startswith(ROI_PART)
    }
    for part in FEATURE_PARTS:
        module = getattr(detector, part, None)
        if isinstance(module, nn.Module):
            names.update(f'{part}.{name}' for name in transformer_blocks(module))
            if not any(name.startswith(f'{part}.') for name in names):
                names.add(part)
    mask_head = getattr(detector, MASK_HEAD, None)
    if isinstance(mask_head, nn.Module) and hasattr(detector, 'bbox_head'):
        names.update(f'{MASK_HEAD}.{name}' for name, part in mask_head.named_children() if _weighted_layers(part))
    if not names:
        raise UserError(
            f'{type(detector).__name__} has neither BatchNorm nor backbone or neck: name the modules to compare in '
            "FeatureMSELoss, modules=['...']"
        )
    return [name for name, _ in detector.named_modules() if name in names]


def transformer_blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks of ``model``, in order of registration.

    An attention module is what says into how many heads it splits its channels (``num_heads`` or
    ``num_attention_heads``), the innermost that does. Its block is the smallest module around it that also owns the
    feed-forward network: two or more linear layers or convolutions that are not the attention's.
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
            if _weighted_layers(modules[around]) - _weighted_layers(modules[attention]) >= 2:
                blocks.add(around)
                break
    return [name for name in modules if name in blocks]


def _weighted_layers(module: nn.Module) -> int:
    return sum(isinstance(child, nn.Linear | _ConvNd) for child in module.modules())
