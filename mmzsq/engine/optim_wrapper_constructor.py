# SPDX-License-Identifier: Apache-2.0
"""An optimizer with as few parameter groups as there are rules, instead of one for each parameter."""

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
"""Optimizers of PyTorch with ``fused``, one kernel for many parameters, on a GPU from torch 2.1 on."""
MIN_SIZE = 1e-8
"""Least root mean square of a weight that rates are relative to."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, whose groups of equal settings are joined.

    With ``paramwise_cfg`` MMEngine gives each parameter a group, and PyTorch's optimizers launch their kernels group by
    group: for a detector of some hundred parameters that takes longer than its backward. On a GPU, Adam and AdamW are
    also fused, unless the config says otherwise. What is learnt does not change.

    With ``paramwise_cfg['relative_lr']`` the weight of each quantized layer learns at a rate in proportion to its size
    (:func:`relative_rates`). Adam moves all weights about equally far, and those of a wide late layer may be ten times
    as small as those of a narrow early one: in steps of their quantizers they would move ten times as far.
    """

    optimizer_cfg: dict[str, Any]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper.

        Args:
            model: On the device that it trains on.
        """
        if self.optimizer_cfg['type'] in FUSED_OPTIMIZERS and all(p.is_cuda for p in model.parameters()):
            self.optimizer_cfg = dict(dict(fused=True), **self.optimizer_cfg)
        return super().__call__(model)

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = '', is_dcn_module: bool | None = None
    ) -> None:
        """Append the parameter groups of ``module``; those of the whole model, which has no prefix, are joined."""
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        with _without_a_line_for_each_parameter():
            super().add_params(params, module, prefix, is_dcn_module)
        params[:] = join_groups(params)
        for group in params:
            settings = ', '.join(f'{key}={value}' for key, value in group.items() if key != 'params') or 'as configured'
            print_log(f'optimizer: {len(group["params"])} parameters with {settings}', logger='current')


def join_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join parameter groups with equal settings; a parameter that comes twice stays where it came first."""
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
def _without_a_line_for_each_parameter() -> Iterator[None]:
    """Inside the block MMEngine's log leaves out the settings of single parameters, hundreds of lines."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith('paramwise_options')

    logger = MMLogger.get_current_instance()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
