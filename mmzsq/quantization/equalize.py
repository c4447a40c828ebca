# SPDX-License-Identifier: Apache-2.0
"""Input channels brought to like ranges before they share one step: what one loses in range another gains in levels.

An input has one step for all of its channels, and few bits leave a channel of small values hardly a level. So each
channel c is divided by a number e_c, and the weights that it meets are multiplied by it, which changes nothing in float
(Xiao et al., "SmoothQuant", 2022, https://arxiv.org/abs/2211.10438, for the outliers of transformers). Products are
those of integers as before; the division joins the requantization of what makes the input, one factor a channel.

The factors are e_c = s_c^a / w_c^b, with s_c the size of what channel c carries and w_c that of its weights. Of a few a
and b those are taken whose estimated error of the layer's output is least, a = b = 0 among them (Lin et al., "AWQ",
2023, https://arxiv.org/abs/2306.00978, search alike for weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmzsq.quantization.calibrate import quantizers, switched_off
from mmzsq.quantization.fake_quantize import fake_quantize
from mmzsq.quantization.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantizedLayer,
    QuantLinear,
    input_scale,
    quantized_layers,
)
from mmzsq.quantization.quantizers import LSQ

EQUALizED = (QuantConv1d, QuantConv2d, QuantConvTranspose2d, QuantLinear)
"""Exact classes: others compute more than a product of their input with their weight."""
ROWS = 256
"""Places that are looked at in each run of a layer, every one a value of each channel."""
MAX_ROWS = 2048
"""Of all runs."""
VALUES = 2**14
"""By which the step of an input is searched."""
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the size of a channel's values."""
WEIGHT_POWERS = (0.0, 0.5)
"""Of the size of its weights."""
RANGE = 16.0
"""Factors lie between this and its inverse: a channel that was silent by chance may speak up later."""


def add_input_scale(layer: QuantizedLayer) -> None:
    """Have a layer divide its input channel by channel, by one until :func:`equalize` knows better.

    Args:
        layer: A quantized one; nothing is done if it is none of :data:`EQUALizED`.
    """
    if type(layer) not in EQUALizED:
        return
    channels = layer.in_features if isinstance(layer, QuantLinear) else layer.in_channels
    layer.register_buffer('input_scale', torch.ones(channels, device=layer.weight.device))  # type: ignore[arg-type]
    layer.register_forward_pre_hook(_divide)


@torch.no_grad()
def remove_input_scale(layer: QuantizedLayer) -> None:
    """Have a layer take its input as it comes again, and undo what its weights made up for.

    Args:
        layer: A quantized one; nothing is done if it does not divide its input.
    """
    scale = input_scale(layer)
    if scale is None:
        return
    layer.weight.copy_(scaled_weight(layer, 1 / scale))
    del layer.input_scale
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _divide:
            del layer._forward_pre_hooks[key]


@torch.no_grad()
def equalize(model: nn.Module, run: Callable[[], Any]) -> None:
    """Choose the factors of all layers that have them and no steps yet, and multiply their weights.

    Every process ends with the factors of the first.

    Args:
        model: A prepared model whose weights are those of the float one.
        run: Runs images through it.
    """
    layers = [
        layer
        for _, layer in quantized_layers(model)
        if input_scale(layer) is not None and not (layer.input_quantizer.ready or layer.weight_quantizer.ready)
    ]
    if not layers:
        return
    samples: dict[QuantizedLayer, list[Tensor]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as undo:
        for _, quantizer in quantizers(model):
            if not quantizer.ready:
                undo.enter_context(switched_off(quantizer))
        for layer in layers:
            undo.enter_context(_sampling(layer, samples[layer], generator))
        run()
    for layer in layers:
        rows = samples.pop(layer)
        scale = best_scale(layer, torch.cat(rows)[:MAX_ROWS]) if rows else torch.ones_like(_scale_of(layer))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(scale, src=0)
        # What was sampled has been divided already, where this is not the first time.
        _scale_of(layer).mul_(scale)
        layer.weight.copy_(scaled_weight(layer, scale))


@torch.no_grad()
def best_scale(layer: QuantizedLayer, rows: Tensor) -> Tensor:
    """Factors of the input channels of least estimated error.

    Args:
        layer: Its weight is that of the float layer.
        rows: Inputs (R, C) at R places.

    Returns:
        Shape (C,), positive, of geometric mean 1 before they are brought into range.
    """
    rows = rows.float()
    weight = _energy(layer, layer.weight).sqrt()
    candidates = [torch.ones_like(weight)]
    for size in (rows.abs().amax(0), rows.square().mean(0).sqrt()):
        for power, weight_power in itertools.product(POWERS, WEIGHT_POWERS):
            if power or weight_power:
                candidates.append(_normalized(size**power / weight.clamp(min=1e-8) ** weight_power))
    errors = torch.stack([_error(layer, rows, candidate) for candidate in candidates])
    # The first of equals: none at all.
    return candidates[int(errors.argmin())]


def scaled_weight(layer: QuantizedLayer, scale: Tensor) -> Tensor:
    """The weight of a layer with what each input channel meets multiplied by a factor.

    Args:
        layer: A layer of :data:`EQUALizED`.
        scale: Shape (C,).
    """
    weight = layer.weight
    if isinstance(layer, QuantLinear):
        return weight * scale
    if isinstance(layer, QuantConvTranspose2d):
        return weight * scale.view(-1, 1, 1, 1)
    groups: int = layer.groups  # type: ignore[assignment]
    return (weight.unflatten(0, (groups, -1)).flatten(3) * scale.view(groups, 1, -1, 1)).view_as(weight)


def _divide(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    scale = _scale_of(layer)
    features: Tensor = inputs[0]
    if not isinstance(layer, QuantLinear):
        scale = scale.view(-1, *(1,) * (features.dim() - 2))
    return (features / scale.to(features.dtype), *inputs[1:])


def _scale_of(layer: nn.Module) -> Tensor:
    scale = input_scale(layer)
    assert scale is not None
    return scale


@contextmanager
def _sampling(layer: QuantizedLayer, rows: list[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Inside, keep some of what the layer is given."""

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        features: Tensor = inputs[0].detach()
        if not isinstance(layer, QuantLinear):
            features = features.flatten(2)
            places = features.shape[0] * features.shape[2]
            chosen = torch.randint(places, (min(ROWS, places),), generator=generator).to(features.device)
            rows.append(features[chosen // features.shape[2], :, chosen % features.shape[2]].float())
        else:
            features = features.flatten(0, -2)
            if len(features):
                chosen = torch.randint(len(features), (min(ROWS, len(features)),), generator=generator)
                rows.append(features[chosen.to(features.device)].float())

    handle = layer.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _normalized(scale: Tensor) -> Tensor:
    """Of geometric mean 1, within range; channels that carry nothing do not count."""
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    alive = scale > 1e-6 * scale.amax()
    return (scale / scale[alive].log().mean().exp()).clamp(1 / RANGE, RANGE)


def _energy(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Sum of squares of the weights, of the shape of the layer's, that each input channel meets, (C,)."""
    squares = weight.float().square()
    if isinstance(layer, QuantLinear):
        return squares.sum(0)
    if isinstance(layer, QuantConvTranspose2d):
        return squares.flatten(1).sum(1)
    groups: int = layer.groups  # type: ignore[assignment]
    return squares.unflatten(0, (groups, -1)).flatten(3).sum((1, 3)).flatten()


def _error(layer: QuantizedLayer, rows: Tensor, scale: Tensor) -> Tensor:
    """Squared error of the outputs, as if those of all inputs and weights were independent."""
    inputs, weight = rows / scale, scaled_weight(layer, scale)
    of_inputs = (_rounded_inputs(layer.input_quantizer, inputs) - inputs).square().mean(0)
    of_weights = _energy(layer, _rounded_weight(layer, weight) - weight)
    return (of_inputs * _energy(layer, weight)).sum() + (inputs.square().mean(0) * of_weights).sum()


def _rounded_inputs(quantizer: LSQ, inputs: Tensor) -> Tensor:
    """Inputs (R, C) on the grid that calibration would give them."""
    values = inputs.flatten()
    sample = values[:: max(values.numel() // VALUES, 1)]
    # One step for values that are all there, which is how a weight gets its own.
    grid = quantizer.grid_of_weight(torch.cat((sample, torch.stack(values.aminmax()))))
    return fake_quantize(values, grid.step, quantizer.qmin, quantizer.qmax, grid.zero_point).view_as(inputs)


def _rounded_weight(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """The weight on a grid that reaches its extremes: to search the best one for each candidate would take long."""
    quantizer = layer.weight_quantizer
    # Where each output channel has its step, the layer's own first dimension need not be that of its outputs.
    if quantizer.num_steps > 1 and not isinstance(layer, QuantConvTranspose2d):
        step = weight.flatten(1).abs().amax(1).view(-1, *(1,) * (weight.dim() - 1))
    else:
        step = weight.abs().amax().view((1,) * weight.dim())
    step = (step / quantizer.qmax).clamp(min=1e-8)
    return fake_quantize(weight, step, quantizer.qmin, quantizer.qmax)
