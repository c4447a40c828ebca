# SPDX-License-Identifier: Apache-2.0
"""Initialize quantizers from data, switch them on and off, and collect their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization.modules import quantized_layers
from mmzsq.quantization.quantizers import LSQ
from mmzsq.quantization.statistics import ActivationStatistics
from mmzsq.quantization.step_search import Grid


def quantizers(model: nn.Module) -> Iterator[tuple[str, LSQ]]:
    """Yield the names and quantizers of a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, LSQ):
            yield name, module


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers of a model on or off. With all of them off, the model computes in float.

    Args:
        model: A prepared model.
        enabled: Whether weights and inputs are quantized.
    """
    for _, quantizer in quantizers(model):
        quantizer.enabled = enabled


def step_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the learned parameters of all quantizers: steps, and the zero points of LSQ+.

    They need a separate learning rate and no weight decay. All of their names contain ``'_quantizer.'``.

    Args:
        model: A prepared model.

    Yields:
        Name and parameter.
    """
    for prefix, quantizer in quantizers(model):
        yield from quantizer.named_parameters(prefix=prefix)


@contextmanager
def calibrating(
    model: nn.Module, on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None
) -> Iterator[None]:
    """Initialize quantizers from the batches that run through the model inside the block.

    Inside the block, uninitialized quantizers pass their input on in float and collect its statistics. At the end of
    the block their steps are set: those of weights from the weights, those of inputs from the statistics of all
    processes if ``torch.distributed`` is initialized. All ranks get the same steps. Initialized quantizers quantize as
    usual and keep their steps. If the block raises, no step is set.

    Args:
        model: A prepared model, the same on every rank. All ranks must enter and leave the block.
        on_progress: Called with ``'steps'``, the number of quantizers whose steps are set, and their total number, at
            the end of the block.

    Raises:
        UserError: If a layer received no input on any rank, or an input that is not finite.

    Example:
        >>> with torch.no_grad(), calibrating(model):  # doctest: +SKIP
        ...     for images in batches:
        ...         model(images)
    """
    layer_of = {layer.weight_quantizer: layer for _, layer in quantized_layers(model)}
    pending = {name: quantizer for name, quantizer in quantizers(model) if not quantizer.ready}
    statistics: dict[str, ActivationStatistics] = {}
    with ExitStack() as undo:
        for name, quantizer in pending.items():
            undo.enter_context(quantizer_disabled(quantizer))
            if quantizer not in layer_of:
                statistics[name] = ActivationStatistics(quantizer.initialized.device)
                undo.enter_context(_updating(statistics[name], quantizer))
        yield
    for collected in statistics.values():
        collected.gather()
    without_input = _owners(name for name, collected in statistics.items() if not collected.count)
    if without_input:
        raise UserError(
            f'No input reached {", ".join(without_input)} while calibrating. Run batches that use these '
            'layers inside `with calibrating(model):`, or keep them float with '
            '`zsq.quantizer.skip`.'
        )
    not_finite = _owners(name for name, collected in statistics.items() if not collected.is_finite)
    if not_finite:
        raise UserError(
            f'The input of {", ".join(not_finite)} was infinite or NaN while calibrating: check the '
            'checkpoint and the images, or run without autocast.'
        )
    on_progress('steps', 0, len(pending))
    for done, (name, quantizer) in enumerate(pending.items(), 1):
        if quantizer in layer_of:
            grid = quantizer.initial_weight_grid(layer_of[quantizer].filters())
        else:
            grid = quantizer.initial_activation_grid(statistics.pop(name))
        quantizer.set_grid(_broadcast(grid))
        on_progress('steps', done, len(pending))


def _owners(names: Iterable[str]) -> list[str]:
    """Return the names of the modules that own the named quantizers, each once."""
    return list(dict.fromkeys(name.rpartition('.')[0] for name in names))


@contextmanager
def quantizer_disabled(quantizer: LSQ) -> Iterator[None]:
    """Inside the block, a quantizer returns its input unchanged."""
    before = quantizer.enabled
    quantizer.enabled = False
    try:
        yield
    finally:
        quantizer.enabled = before


@contextmanager
def _updating(statistics: ActivationStatistics, quantizer: LSQ) -> Iterator[None]:
    """Inside the block, update ``statistics`` with every input of ``quantizer``."""

    def update(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.update(args[0])

    handle = quantizer.register_forward_pre_hook(update)
    try:
        yield
    finally:
        handle.remove()


def _broadcast(grid: Grid) -> Grid:
    """Return the grid of rank 0: equal statistics may give grids that differ in the last bits on other devices."""
    if not (dist.is_available() and dist.is_initialized()):
        return grid
    both = torch.stack(grid)
    dist.broadcast(both, src=0)
    return Grid(*both)
