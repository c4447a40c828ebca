# SPDX-License-Identifier: Apache-2.0
"""Optimizer constructor that merges parameter groups with equal settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmzsq.registry import OPTIM_WRAPPER_CONSTRUCTORS

FUSED_OPTIMIZERS = ('Adam', 'AdamW')
"""PyTorch optimizers with a ``fused`` implementation, one kernel for many parameters, on GPUs from torch 2.1 on."""
MIN_SIZE = 1e-8
"""Least root mean square of a weight that rates are relative to."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor with merged parameter groups.

    With ``paramwise_cfg``, MMEngine makes one group per parameter, and PyTorch's optimizers launch kernels group by
    group. For a detector of some hundred parameters, that takes longer than backward. Groups with equal settings are
    merged here. On a GPU, Adam and AdamW also use ``fused=True`` unless the config sets it. The updates are the same.
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
        with _mute_paramwise_log():
            super().add_params(params, module, prefix, is_dcn_module)
        params[:] = join_groups(params)
        for group in params:
            settings = ', '.join(f'{key}={value}' for key, value in group.items() if key != 'params')
            how = f'with {settings}' if settings else 'as configured'
            print_log(f'optimizer: {len(group["params"])} parameters {how}', logger='current')


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
def _mute_paramwise_log() -> Iterator[None]:
    """Drop MMEngine's log lines with the settings of each parameter inside the block; there are hundreds."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith('paramwise_options')

    logger = MMLogger.get_current_instance()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
