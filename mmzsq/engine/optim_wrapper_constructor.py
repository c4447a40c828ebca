# SPDX-License-Identifier: Apache-2.0
"""Optimizer constructor that merges parameter groups with equal settings, and knows the size of weights."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmzsq.registry import OPTIM_WRAPPER_CONSTRUCTORS

FUSED_OPTIMIZERS = ('Adam', 'AdamW')
"""PyTorch optimizers with a ``fused`` implementation, one kernel for many parameters, on GPUs from torch 2.1 on."""
LARGEST_FACTOR = 10.0
"""Largest factor of the learning rate for the size of the weights."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor with merged parameter groups.

    With ``paramwise_cfg``, MMEngine makes one group per parameter, and PyTorch's optimizers launch kernels group by
    group. For a detector of some hundred parameters, that takes longer than backward. Groups with equal settings are
    merged here. On a GPU, Adam and AdamW also use ``fused=True`` unless the config sets it. The updates are the same.

    ``paramwise_cfg['weight_size']`` is the size of weights that the learning rate is meant for, see
    :func:`typical_size`. Where weights are larger, all parameters without a rate of their own learn as much faster, up
    to :data:`LARGEST_FACTOR` times: Adam moves a weight by about the rate in each step, and the grid that it has to
    cross is as coarse as the weights are large.
    """

    optimizer_cfg: dict[str, Any]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Args:
            model: The model, on the device on which it is trained.
        """
        if self.optimizer_cfg['type'] in FUSED_OPTIMIZERS and all(p.is_cuda for p in model.parameters()):
            self.optimizer_cfg = dict(dict(fused=True), **self.optimizer_cfg)
        return super().__call__(model)

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = '', is_dcn_module: bool | None = None
    ) -> None:
        """Append the parameter groups of ``module``, and merge them if it is the whole model.

        MMEngine calls this method for the model and, recursively, for each of its modules.

        Args:
            params: Parameter groups. New ones are appended; for the whole model, the list is merged in place.
            module: The model or one of its modules.
            prefix: Name of the module; empty for the whole model.
            is_dcn_module: Whether the module belongs to a deformable convolution, see MMEngine.
        """
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        # MMEngine logs the settings of each parameter; there are hundreds.
        with muted('paramwise_options'):
            super().add_params(params, module, prefix, is_dcn_module)
        self._fit_to_weights(params)
        params[:] = join_groups(params)
        for group in params:
            settings = ', '.join(
                f'{key}={value:g}' if isinstance(value, float) else f'{key}={value}'
                for key, value in group.items()
                if key != 'params'
            )
            how = f'with {settings}' if settings else 'as configured'
            print_log(f'optimizer: {len(group["params"])} parameters {how}', logger='current')

    def _fit_to_weights(self, params: list[dict[str, Any]]) -> None:
        """Scale the learning rate with the size of the weights, in groups that set no learning rate."""
        intended = (self.paramwise_cfg or {}).get('weight_size')
        groups = [group for group in params if 'lr' not in group]
        size = typical_size([p for group in groups for p in group['params']])
        if intended is None or size is None or size <= intended:
            return
        factor = min(size / intended, LARGEST_FACTOR)
        lr = self.base_lr * float(f'{factor:.2g}')
        for group in groups:
            group['lr'] = lr
        print_log(
            f'optimizer: lr={lr:.2g}, {factor:.2g} times that of the config, since the weights of this detector are '
            f'larger: {size:.2g} instead of {intended:g} (zsq.train.weight_size)',
            logger='current',
        )


def typical_size(parameters: Iterable[nn.Parameter]) -> float | None:
    """Return the median of the root mean squares of weights, or None if there are none.

    Args:
        parameters: Parameters. Those of less than two dimensions, such as biases, do not count.
    """
    sizes = [float(p.detach().float().square().mean().sqrt()) for p in parameters if p.dim() > 1]
    return statistics.median(sizes) if sizes else None


def join_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge parameter groups with equal settings.

    Args:
        groups: Parameter groups of a PyTorch optimizer. A parameter that occurs twice keeps its first group.

    Returns:
        The merged groups, in order of their first occurrence.

    Example:
        >>> a, b, c = nn.ParameterList(nn.Linear(1, 1).weight for _ in range(3))
        >>> groups = [dict(params=[a], lr=0.1), dict(params=[b], lr=0.2), dict(params=[c], lr=0.1)]
        >>> [(len(group['params']), group['lr']) for group in join_groups(groups)]
        [(2, 0.1), (1, 0.2)]
    """
    joined: list[dict[str, Any]] = []
    seen: set[int] = set()
    for group in groups:
        settings = {key: value for key, value in group.items() if key != 'params'}
        parameters = [p for p in group['params'] if id(p) not in seen]
        seen.update(map(id, parameters))
        for other in joined:
            if {key: value for key, value in other.items() if key != 'params'} == settings:
                other['params'].extend(parameters)
                break
        else:
            if parameters:
                joined.append(dict(settings, params=parameters))
    return joined


@contextmanager
def muted(start: str) -> Iterator[None]:
    """Drop log lines inside the block.

    Args:
        start: Start of the lines.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    logger = MMLogger.get_current_instance()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
