# SPDX-License-Identifier: Apache-2.0
"""Data-parallel training in several processes, equivalent to one process that sees all images.

PyTorch's DistributedDataParallel averages gradients during backward. Here they are averaged after backward, so that
forward and backward can be one CUDA graph, and parameters may have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce, all_reduce_params
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class AveragingDataParallel(nn.Module):
    """Model wrapper of teacher and student for MMEngine's Runner in distributed training.

    Gradients are averaged over the processes before each weight update, and running statistics of BatchNorm after each
    step. The Runner starts all processes from the same weights, so they also end with the same weights. BatchNorm
    normalizes by the images of its own process unless the config sets ``sync_bn='torch'``.

    Args:
        module: A :class:`~mmzsq.qat.ZeroShotDetector` on the device of this process.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Take one training step. All processes must call this together.

        Args:
            data: A batch of the data loader of this process.
            optim_wrapper: Optimizer wrapper of the module.

        Returns:
            Each loss on the images of this process, and their sum as ``'loss'``.
        """
        log_vars = self.module.train_step(data, optim_wrapper, average_gradients)
        all_reduce_params(_updated_statistics(self.module), op='mean')
        return log_vars

    def val_step(self, data: Any) -> list[Any]:
        """Preprocess a batch and predict."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list[Any]:
        """Preprocess a batch and predict."""
        return self.module.test_step(data)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average the gradients of ``model`` over all processes, in one all-reduce.

    A missing gradient counts as zero. If no process has a gradient of a parameter, it stays None, so that weight decay
    does not apply, as in a single process.

    Args:
        model: The model. Every process must train the same parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    missing = [p for p in parameters if p.grad is None]
    # Filled on the device if no gradient is missing: a copy from the host would wait for backward to finish.
    found = torch.ones(len(parameters), device=parameters[0].device)
    if missing:
        found.copy_(torch.tensor([float(p.grad is not None) for p in parameters]))
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in parameters if p.grad is not None]
    # One kernel concatenates the gradients. The new gradients are views of the result, without copies.
    joined = torch.cat([found, *(grad.reshape(-1) for grad in grads)])
    all_reduce(joined, op='mean')
    anywhere, *means = joined.split([len(found), *(grad.numel() for grad in grads)])
    for parameter, grad, mean in zip(parameters, grads, means, strict=True):
        if grad.is_contiguous() and grad.dtype == joined.dtype:
            parameter.grad = mean.view_as(grad)
        else:
            # The gradient must keep the memory layout and dtype that the optimizer expects.
            grad.copy_(mean.view_as(grad))
    if missing:
        found_anywhere = dict(zip(parameters, anywhere.tolist(), strict=True))
        for parameter in missing:
            if not found_anywhere[parameter]:
                parameter.grad = None


def _updated_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of all BatchNorm layers in train mode."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    return [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
