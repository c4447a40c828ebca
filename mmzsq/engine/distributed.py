# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, each on images of its own, that learn as one would from all of them.

PyTorch's DistributedDataParallel averages gradients while backward runs. Here that happens once backward is done, so
that forward and backward can be one CUDA graph, and may leave parameters without gradient.
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
    """What MMEngine's Runner wraps teacher and student in when there are several processes.

    Before each update of the weights the gradients become the mean over the processes, and after each step so do the
    statistics that BatchNorm layers gather. Processes that start from the same weights, as the Runner sees to, end with
    the same. Each still normalizes by its own images, unless ``sync_bn='torch'`` in the config says otherwise.

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
        """Take one step; every process takes it at the same time.

        Args:
            data: A batch of the data loader of this process.
            optim_wrapper: Of the module.

        Returns:
            Each loss on the images of this process, and ``'loss'``, their sum.
        """
        log_vars = self.module.train_step(data, optim_wrapper, average_gradients)
        all_reduce_params(_gathered_statistics(self.module), op='mean')
        return log_vars

    def val_step(self, data: Any) -> list[Any]:
        """Predict, with what the module makes of its images before."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list[Any]:
        """Predict, with what the module makes of its images before."""
        return self.module.test_step(data)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace the gradients of ``model`` by their means over all processes, in one exchange.

    A parameter without a gradient counts as one of zeros, and stays without where no process has any: weight decay
    leaves it alone then, as it does in one process.

    Args:
        model: The same parameters are trained in every process.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    missing = [p for p in parameters if p.grad is None]
    # Filled on the device where nothing is missing: a copy from the host would wait for backward to end.
    found = torch.ones(len(parameters), device=parameters[0].device)
    if missing:
        found.copy_(torch.tensor([float(p.grad is not None) for p in parameters]))
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in parameters if p.grad is not None]
    # Joined by one kernel. The means are taken as they lie, not copied back one by one.
    joined = torch.cat([found, *(grad.reshape(-1) for grad in grads)])
    all_reduce(joined, op='mean')
    anywhere, *means = joined.split([len(found), *(grad.numel() for grad in grads)])
    for parameter, grad, mean in zip(parameters, grads, means, strict=True):
        if grad.is_contiguous() and grad.dtype == joined.dtype:
            parameter.grad = mean.view_as(grad)
        else:
            # The optimizer wants the layout and the type of the parameter.
            grad.copy_(mean.view_as(grad))
    if missing:
        found_anywhere = dict(zip(parameters, anywhere.tolist(), strict=True))
        for parameter in missing:
            if not found_anywhere[parameter]:
                parameter.grad = None


def _gathered_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the BatchNorm layers in train mode."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    return [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
