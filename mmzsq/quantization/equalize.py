# SPDX-License-Identifier: Apache-2.0
"""Per-channel equalization of the inputs of layers (SmoothQuant).

All channels of an input share one step. With few bits, a channel of small values gets hardly any levels. Equalization
divides each channel c by a factor e_c and multiplies the weights of that channel by it, which changes nothing in float
(Xiao et al., "SmoothQuant", 2022, https://arxiv.org/abs/2211.10438, for the outliers of transformers). The layer still
multiplies integers. The division is merged into the requantization of the preceding output, as one factor per channel.

The factors are e_c = s_c^a / w_c^b, where s_c is the magnitude of channel c and w_c that of its weights. The exponents
a and b are chosen from a small set, which includes a = b = 0, to minimize the estimated error of the layer's output
(Lin et al., "AWQ", 2023, https://arxiv.org/abs/2306.00978, use a similar search for weights).

Factors are fixed from then on, or learned: their logarithms are then parameters, which train with the steps. The weight
is stored as in the float layer, and each forward multiplies it. Without rounding, a factor changes nothing, so its
gradient is that of rounding and clipping in the input and in the weights.

A depthwise convolution reads each input channel in one output channel, whose weights have a step of their own. Factors
then cost the weights nothing, and amount to one step per channel of the input, which integers compute exactly: the
accumulator of each output channel has a scale of its own anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmzsq.quantization.calibrate import quantizer_disabled, quantizers
from mmzsq.quantization.fake_quantize import fake_quantize
from mmzsq.quantization.modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantizedLayer,
    QuantLinear,
    input_scale,
    learned_log_scale,
    quantized_layers,
    scaled_weight,
)
from mmzsq.quantization.quantizers import LSQ
from mmzsq.quantization.step_search import Grid

EQUALIZABLE = (QuantConv1d, QuantConv2d, QuantConvTranspose2d, QuantLinear)
"""Exact classes of the layers to equalize. Other classes compute more than a product of input and weight."""
ROWS = 256
"""Positions sampled in each call of a layer; a position has one value of each channel."""
MAX_ROWS = 2048
"""Positions used of all calls."""
VALUES = 2**14
"""Input values on which the step of an input is searched."""
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidate exponents a of the magnitude of a channel."""
WEIGHT_POWERS = (0.0, 0.5)
"""Candidate exponents b of the magnitude of its weights."""
REFINEMENTS = 33
"""Candidate changes of a factor in one round, from 1/2 to 2, including 1."""
ROUNDS = 3
"""Rounds of refinement of a depthwise convolution."""
CLIPPING = (1.0, 0.2, 33)
"""Steps that are tried for an input with learned factors, as fractions of the step that clips nothing."""
MAX_SCALE = 16.0
"""Factors lie between 1 / MAX_SCALE and MAX_SCALE: a channel without values in the sample may have some later."""


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution in which each input channel belongs to a group of its own."""
    if type(layer) not in (QuantConv1d, QuantConv2d):
        return False
    convolution = cast('nn.Conv1d | nn.Conv2d', layer)
    return convolution.groups == convolution.in_channels > 1


def add_input_scale(layer: QuantizedLayer, learned: bool = False) -> None:
    """Let a layer divide its input by one factor per channel. The factors are 1 until :func:`equalize` sets them.

    Args:
        layer: A quantized layer. Layers of other classes than :data:`EQUALIZABLE` are left unchanged.
        learned: Whether training learns the factors. The stored weight is then that of the float layer, and each
            forward multiplies it by the factors.
    """
    if type(layer) not in EQUALIZABLE:
        return
    channels = layer.in_features if isinstance(layer, QuantLinear) else layer.in_channels
    device = layer.weight.device
    if learned:
        layer.register_parameter('log_input_scale', nn.Parameter(torch.zeros(channels, device=device)))  # type: ignore[arg-type]
    else:
        layer.register_buffer('input_scale', torch.ones(channels, device=device))  # type: ignore[arg-type]
    layer.register_forward_pre_hook(_divide)


@torch.no_grad()
def remove_input_scale(layer: QuantizedLayer) -> None:
    """Remove the input factors of a layer, and divide its weights by fixed ones.

    Args:
        layer: A quantized layer. A layer without factors is left unchanged.
    """
    if learned_log_scale(layer) is not None:
        del layer.log_input_scale
    elif input_scale(layer) is not None:
        layer.weight.copy_(scaled_weight(layer, 1 / _scale_of(layer)))
        del layer.input_scale
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _divide:
            del layer._forward_pre_hooks[key]


@contextmanager
def constant_input_scales(model: nn.Module) -> Iterator[None]:
    """Inside the block, learned factors are constants, so that a traced graph holds their values.

    Args:
        model: A prepared model.
    """
    layers = [layer for _, layer in quantized_layers(model) if learned_log_scale(layer) is not None]
    for layer in layers:
        layer.register_buffer('input_scale', _scale_of(layer).detach(), persistent=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.input_scale


@torch.no_grad()
def equalize(
    model: nn.Module,
    run: Callable[[], Any],
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> None:
    """Choose the input factors of all uninitialized layers that have some, and multiply their weights by them.

    All processes get the factors of rank 0.

    Args:
        model: A prepared model with the weights of the float model.
        run: Runs images through the model.
        on_progress: Called with ``'factors'``, the number of layers whose factors are chosen, and their total number.
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
                undo.enter_context(quantizer_disabled(quantizer))
        for layer in layers:
            undo.enter_context(_sampling(layer, samples[layer], generator))
        run()
    on_progress('factors', 0, len(layers))
    for done, layer in enumerate(layers, 1):
        rows = samples.pop(layer)
        scale = best_scale(layer, torch.cat(rows)[:MAX_ROWS]) if rows else torch.ones_like(_scale_of(layer))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(scale, src=0)
        # Samples are already divided by the present factors, which differ from 1 if this is not the first call.
        log_scale = learned_log_scale(layer)
        if log_scale is not None:
            log_scale.add_(scale.log())
        else:
            _scale_of(layer).mul_(scale)
            layer.weight.copy_(scaled_weight(layer, scale))
        on_progress('factors', done, len(layers))


@torch.no_grad()
def best_scale(layer: QuantizedLayer, rows: Tensor) -> Tensor:
    """Find the input factors with the least estimated error of the output.

    Args:
        layer: A layer with the weight of the float layer.
        rows: Inputs at R positions, (R, C).

    Returns:
        Positive factors, (C,), with geometric mean 1 before they are clamped to :data:`MAX_SCALE`.
    """
    rows = rows.float()
    weight = _energy(layer, layer.applied_weight()).sqrt()
    candidates = [torch.ones_like(weight)]
    for size in (rows.abs().amax(0), rows.square().mean(0).sqrt()):
        for power, weight_power in itertools.product(POWERS, WEIGHT_POWERS):
            if power or weight_power:
                candidates.append(_normalized(size**power / weight.clamp(min=1e-8) ** weight_power))
    errors = torch.stack([_error(layer, rows, candidate) for candidate in candidates])
    # Of equal errors argmin takes the first: factors of 1.
    best = candidates[int(errors.argmin())]
    if learned_log_scale(layer) is not None and is_depthwise(layer):
        return _refined(layer, rows, best)
    return best


def _refined(layer: QuantizedLayer, rows: Tensor, scale: Tensor) -> Tensor:
    """Improve the factors of a depthwise convolution, whose weights lose nothing by them.

    Each channel is then free to choose the part of the grid that it uses. Given the grid, the best choices of the
    channels do not depend on each other; given these, the grid is searched again.
    """
    multipliers = torch.logspace(-1, 1, REFINEMENTS, base=2.0, device=rows.device)
    best, least = scale, _error(layer, rows, scale)
    for _ in range(ROUNDS):
        inputs = rows / scale
        grid = _input_grid(layer, inputs)
        errors = torch.stack(
            [(_on_grid(layer.input_quantizer, inputs / m, grid) * m - inputs).square().sum(0) for m in multipliers]
        )
        scale = _normalized(scale * multipliers[errors.argmin(0)])
        error = _error(layer, rows, scale)
        if error < least:
            best, least = scale, error
    return best


def _divide(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    scale = _scale_of(layer)
    features: Tensor = inputs[0]
    if not isinstance(layer, QuantLinear):
        scale = scale.view(-1, *(1,) * (features.dim() - 2))
    if learned_log_scale(layer) is not None:
        # The weights are multiplied by factors in fp32; those of the input must not be rounded to 16 bits.
        return ((features / scale).to(features.dtype), *inputs[1:])
    return (features / scale.to(features.dtype), *inputs[1:])


def _scale_of(layer: nn.Module) -> Tensor:
    scale = input_scale(layer)
    assert scale is not None
    return scale


@contextmanager
def _sampling(layer: QuantizedLayer, rows: list[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Inside the block, append a random sample of the layer's inputs, (positions, C), to ``rows`` at each call."""

    def sample(module: nn.Module, inputs: tuple[Any, ...]) -> None:
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

    handle = layer.register_forward_pre_hook(sample)
    try:
        yield
    finally:
        handle.remove()


def _normalized(scale: Tensor) -> Tensor:
    """Scale factors to geometric mean 1 and clamp them; channels without values do not count in the mean."""
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    alive = scale > 1e-6 * scale.amax()
    return (scale / scale[alive].log().mean().exp()).clamp(1 / MAX_SCALE, MAX_SCALE)


def _energy(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Sum of squares of the weights of each input channel, (C,), for a weight shaped as that of the layer."""
    squares = weight.float().square()
    if isinstance(layer, QuantLinear):
        return squares.sum(0)
    if isinstance(layer, QuantConvTranspose2d):
        return squares.flatten(1).sum(1)
    groups: int = layer.groups  # type: ignore[assignment]
    return squares.unflatten(0, (groups, -1)).flatten(3).sum((1, 3)).flatten()


def _error(layer: QuantizedLayer, rows: Tensor, scale: Tensor) -> Tensor:
    """Estimate the squared error of the output, as if the errors of all inputs and weights were independent."""
    inputs, weight = rows / scale, scaled_weight(layer, scale, layer.applied_weight())
    rounded = _on_grid(layer.input_quantizer, inputs, _input_grid(layer, inputs))
    of_inputs = (rounded - inputs).square().mean(0)
    of_weights = _energy(layer, _rounded_weight(layer, weight) - weight)
    return (of_inputs * _energy(layer, weight)).sum() + (inputs.square().mean(0) * of_weights).sum()


def _input_grid(layer: QuantizedLayer, inputs: Tensor) -> Grid:
    """Return the grid that calibration would choose for inputs (R, C), or for learned factors one close to it."""
    quantizer, values = layer.input_quantizer, inputs.flatten()
    sample = torch.cat((values[:: max(values.numel() // VALUES, 1)], torch.stack(values.aminmax())))
    if learned_log_scale(layer) is not None:
        return _clipped_grid(quantizer, sample)
    # The rule for weights applies: it takes one step for a tensor that is known in full.
    return quantizer.initial_weight_grid(sample)


def _clipped_grid(quantizer: LSQ, values: Tensor) -> Grid:
    """Find the best of the grids that clip the same part of both ends.

    A search of all zero points takes most of a second for 8 bits, and would run for each candidate of each layer.
    """
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    if quantizer.scheme == 'offset':
        widest = (high - low) / quantizer.qmax
        zero_point = (-low / widest.clamp(min=1e-8)).round()
    else:
        widest = torch.maximum(high / quantizer.qmax, low / min(quantizer.qmin, -1))
        zero_point = torch.zeros_like(low)
    steps = (widest * torch.linspace(*CLIPPING, device=values.device)).clamp(min=1e-8)[:, None]
    rounded = fake_quantize(values[None], steps, quantizer.qmin, quantizer.qmax, zero_point.view(1, 1).expand_as(steps))
    best = (rounded - values).square().sum(1).argmin()
    return Grid(steps[best], zero_point.view(1))


def _on_grid(quantizer: LSQ, inputs: Tensor, grid: Grid) -> Tensor:
    values = inputs.flatten()
    return fake_quantize(values, grid.step, quantizer.qmin, quantizer.qmax, grid.zero_point).view_as(inputs)


def _rounded_weight(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Round the weight to a grid that reaches its extremes: to search the best grid per candidate would take long."""
    quantizer = layer.weight_quantizer
    # The first dimension of a transposed convolution's weight is not that of its output channels.
    if quantizer.num_steps > 1 and not isinstance(layer, QuantConvTranspose2d):
        step = weight.flatten(1).abs().amax(1).view(-1, *(1,) * (weight.dim() - 1))
    else:
        step = weight.abs().amax().view((1,) * weight.dim())
    step = (step / quantizer.qmax).clamp(min=1e-8)
    return fake_quantize(weight, step, quantizer.qmin, quantizer.qmax)
