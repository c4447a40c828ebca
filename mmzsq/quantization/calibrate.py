# SPDX-License-Identifier: Apache-2.0
"""Giving quantizers their first steps, switching them, and finding what they learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """Names and quantizers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LSQ):
            yield name, module


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers of a model on, or off, which leaves the float model.

    Args:
        model: A prepared model.
        enabled: Whether weights and inputs are quantized.
    """
    for _, quantizer in quantizers(model):
        quantizer.enabled = enabled


def step_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What quantizers learn: steps, and the zero points of LSQ+.

    They want their own learning rate and no weight decay. All of their names hold
    ``'_quantizer.'``.

    Args:
        model: A prepared model.

    Yields:
        Name and parameter.
    """
    for prefix, quantizer in quantizers(model):
        yield from quantizer.named_parameters(prefix=prefix)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Initialize quantizers from the batches that run through the model inside.

    While inside, quantizers without steps pass values on in float and remember them; at the end
    their steps are set: of weights from the weights, of inputs from what was seen, by all processes
    together if ``torch.distributed`` is initialized. Every rank ends with the same steps.
    Quantizers that have steps work as always and keep them. If the body raises, nothing is set.

    Args:
        model: A prepared model. Every rank enters and leaves with the same model.

    Raises:
        UserError: If a layer saw no input on any rank, or one that is not finite.

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
            undo.enter_context(switched_off(quantizer))
            if quantizer not in layer_of:
                seen = statistics[name] = ActivationStatistics(quantizer.initialized.device)
                undo.enter_context(_watching(quantizer, seen))
        yield
    for seen in statistics.values():
        seen.gather()
    unseen = _owners(name for name, seen in statistics.items() if not seen.count)
    if unseen:
        raise UserError(
            f'No input reached {", ".join(unseen)} while calibrating. Run batches that use these '
            'layers inside `with calibrating(model):`, or keep them float with '
            '`zsq.quantizer.skip`.'
        )
    broken = _owners(name for name, seen in statistics.items() if not seen.is_finite)
    if broken:
        raise UserError(
            f'The input of {", ".join(broken)} was infinite or NaN while calibrating: check the '
            'checkpoint and the images, or run without autocast.'
        )
    for name, quantizer in pending.items():
        if quantizer in layer_of:
            grid = quantizer.grid_of_weight(layer_of[quantizer].filters())
        else:
            grid = quantizer.grid_of_activations(statistics.pop(name))
        quantizer.set_grid(_from_first_rank(grid))


def _owners(names: Iterable[str]) -> list[str]:
    """Names of the modules that the named quantizers belong to, each once."""
    return list(dict.fromkeys(name.rpartition('.')[0] for name in names))


@contextmanager
def switched_off(quantizer: LSQ) -> Iterator[None]:
    """Inside, a quantizer passes values on."""
    before = quantizer.enabled
    quantizer.enabled = False
    try:
        yield
    finally:
        quantizer.enabled = before


@contextmanager
def _watching(quantizer: LSQ, seen: ActivationStatistics) -> Iterator[None]:
    """Let ``seen`` take in what ``quantizer`` is given."""

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(args[0])

    handle = quantizer.register_forward_pre_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def _from_first_rank(grid: Grid) -> Grid:
    """Equal inputs give equal grids, but not to the last bit on unlike devices."""
    if not (dist.is_available() and dist.is_initialized()):
        return grid
    both = torch.stack(grid)
    dist.broadcast(both, src=0)
    return Grid(*both)
