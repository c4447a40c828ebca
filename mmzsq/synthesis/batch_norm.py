# SPDX-License-Identifier: Apache-2.0
"""Differentiable mean and variance of the inputs of a detector's BatchNorm layers.

:class:`BatchNormStatisticsCollector` collects them while a detector runs. On CUDA, one kernel computes the statistics,
BatchNorm in eval mode and the activation behind it (:mod:`mmzsq.synthesis.kernels`). Elsewhere a hook collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mmzsq.fused_kernels import HAS_TRITON, fused_kernels_enabled

FUSED_ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.SiLU: 2}
"""Activations of the fused kernel, by exact class, and its numbers for them."""

MAX_CHANNELS = 4096
"""Of the fused kernel, which holds a value of every channel at once."""


class BatchNormStatistics(NamedTuple):
    """Statistics of all layers that ran, one after the other in order of execution.

    Attributes:
        mean: Of the inputs over (N, H, W), fp32, shape (sum of channels,).
        variance: Biased, likewise.
        layers: The layers, in the same order.
    """

    mean: Tensor
    variance: Tensor
    layers: list[_BatchNorm]


class BatchNormStatisticsCollector:
    """Takes the statistics of every forward of a detector's BatchNorm layers."""

    def __init__(self) -> None:
        self._seen: dict[_BatchNorm, list[tuple[Tensor, int]]] = {}
        self._handles: list[RemovableHandle] = []
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._active = False
        self._layouts: dict[tuple[tuple[_BatchNorm, int], ...], tuple[Tensor, Tensor]] = {}

    def attach(self, detector: nn.Module) -> None:
        """Watch the layers with running statistics; those of a shared pyramid head may run several times a forward."""
        on_gpu = next(detector.parameters()).is_cuda
        fused = on_gpu and HAS_TRITON and fused_kernels_enabled()
        activations = _activations_behind(detector) if fused else {}
        for layer in watched_layers(detector):
            if fused and _is_replaceable(layer) and layer.num_features <= MAX_CHANNELS:
                activation = activations.get(layer)
                kind = 0
                if activation is not None and 'forward' not in vars(activation):
                    kind = FUSED_ACTIVATIONS[type(activation)]
                    self._forwards[activation] = _identity
                self._forwards[layer] = self._fused_forward(layer, kind)
            elif on_gpu and _is_replaceable(layer):
                self._forwards[layer] = self._joint_forward(layer)
            else:
                self._handles.append(layer.register_forward_pre_hook(self._record))
        self._resume()

    def detach(self) -> None:
        """Stop watching, and forget."""
        self._pause()
        for handle in self._handles:
            handle.remove()
        self._handles, self._forwards = [], {}
        self._seen.clear()
        self._layouts.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is watched, and the layers are as they were.

        What a captured CUDA graph reads stays where it is, unlike after :meth:`detach`.
        """
        self._pause()
        try:
            yield
        finally:
            self._resume()

    def forget(self) -> None:
        """Drop what was seen since the last :meth:`collect`."""
        self._seen.clear()

    def _pause(self) -> None:
        self._active = False
        for module in self._forwards:
            # A module may have been un-patched already: detach() may be called twice.
            vars(module).pop('forward', None)

    def _resume(self) -> None:
        self._active = True
        for module, forward in self._forwards.items():
            module.forward = forward

    def collect(self) -> BatchNormStatistics | None:
        """Return the statistics since the last call, and forget them; None if no layer ran.

        Those of a layer that ran several times are averaged over its runs.
        """
        if not self._seen:
            return None
        layers = list(self._seen)
        runs = [layer for layer, seen in self._seen.items() for _ in seen]
        sums = _added_up([run for seen in self._seen.values() for run, _ in seen])
        counts = [count for seen in self._seen.values() for _, count in seen]
        self._seen.clear()
        key = tuple(zip(runs, counts, strict=True))
        if key not in self._layouts:
            self._layouts[key] = (torch.cat([_center(run) for run in runs]), _spread(counts, runs))
        center, count = self._layouts[key]
        total, squares = torch.cat(sums, dim=1)
        distance = total / count
        mean, variance = center + distance, squares / count - distance.square()
        if len(runs) > len(layers):
            mean, variance = (_average(values, runs, layers) for values in (mean, variance))
        return BatchNormStatistics(mean, variance.clamp(min=0), layers)

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._active:
            return
        self._remember_statistics(layer, *batch_statistics(inputs[0]), _center(layer))

    def _remember(self, layer: nn.Module, sums: Tensor, count: int) -> None:
        """Keep the sums (2, C), or parts of them (P, 2, C), of the distance to the center and of its square.

        Args:
            layer: That ran.
            sums: Over (N, H, W).
            count: Of values in each sum.
        """
        self._seen.setdefault(layer, []).append((sums, count))  # type: ignore[arg-type]

    def _remember_statistics(self, layer: nn.Module, mean: Tensor, variance: Tensor, center: Tensor) -> None:
        distance = mean - center
        self._remember(layer, torch.stack((distance, variance + distance.square())), 1)

    def _joint_forward(self, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
        scale, bias = _affine(layer)
        center = _center(layer)

        def forward(features: Tensor) -> Tensor:
            output, mean, variance = _BatchNormWithStatistics.apply(features, scale, bias)
            self._remember_statistics(layer, mean, variance, center)
            return output

        return forward

    def _fused_forward(self, layer: _BatchNorm, activation: int) -> Callable[[Tensor], Tensor]:
        from mmzsq.synthesis.kernels import BatchNormActivation

        scale, bias = _affine(layer)
        center = _center(layer)

        def forward(features: Tensor) -> Tensor:
            output, partial = BatchNormActivation.apply(features, center, scale, bias, activation)
            self._remember(layer, partial, features.numel() // features.shape[1])
            return output

        return forward


def watched_layers(detector: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers of ``detector`` that remember statistics, in order of registration."""
    return [m for m in detector.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, in fp32 whatever the type of ``features``.

    Args:
        features: Shape (N, C, ...).

    Returns:
        Mean and variance, shape (C,) each.
    """
    mean, variance = _BatchStatistics.apply(features)
    return mean, variance


class _BatchStatistics(torch.autograd.Function):
    """One pass over the features forward, one backward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = _statistics(features)
        ctx.save_for_backward(features, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        features, mean = ctx.saved_tensors
        return _statistics_backward(features, mean, grad_mean, grad_variance)


class _BatchNormWithStatistics(torch.autograd.Function):
    """What a BatchNorm layer in eval mode returns, and the statistics of what it got, by PyTorch's operators alone.

    The layer's own backward rearranges gradients that lie channels last, and all that follows is then slow on a GPU:
    the gradients of its two readers are of two layouts, and so are the inputs of the convolution before it.

    Args:
        features: Shape (N, C, H, W).
        scale: Of each channel, (C,), fp32.
        bias: Added after it, likewise.

    Returns:
        ``features * scale + bias``, and mean and biased variance of ``features``, (C,) each, fp32. ``scale`` and
        ``bias`` get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _statistics(features)
        ctx.save_for_backward(features, mean, scale)
        return _scaled(features, scale, bias), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None, None]:
        features, mean, scale = ctx.saved_tensors
        layout = torch.channels_last if _is_channels_last(features) else torch.contiguous_format
        grad = _scaled(grad_output.contiguous(memory_format=layout), scale, torch.zeros_like(scale))
        return grad.add_(_statistics_backward(features, mean, grad_mean, grad_variance)), None, None


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), fp32.

    On CUDA by the operators of SyncBatchNorm, which accumulate bf16 in fp32 without a copy of the features.
    """
    if features.is_cuda:
        mean, inverse_deviation = torch.batch_norm_stats(features, 0.0)
        return mean, inverse_deviation.square().reciprocal()
    # A third of the time of var_mean, whose reduction is over several dimensions at once.
    mean, variance = torch.batch_norm_update_stats(features.float(), None, None, 0.0)
    return mean, variance


def _statistics_backward(features: Tensor, mean: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
    """The gradient of ``features`` by those of their mean and variance."""
    count = features.numel() // features.shape[1]
    return _scaled(features, 2 * grad_variance / count, grad_mean / count, mean)


def _scaled(features: Tensor, scale: Tensor, bias: Tensor, center: Tensor | None = None) -> Tensor:
    """``(features - center) * scale + bias`` of each channel, in the type of ``features``; without a center it is 0."""
    center = torch.zeros_like(scale) if center is None else center
    if features.is_cuda:
        return torch.batch_norm_elemt(features, scale, bias, center, torch.ones_like(scale), 0.0)
    shape = (1, -1, *[1] * (features.dim() - 2))
    return ((features - center.view(shape)) * scale.view(shape) + bias.view(shape)).to(features.dtype)


def _is_channels_last(features: Tensor) -> bool:
    return features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)


def _affine(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """By what each channel is multiplied in eval mode, and what is added then, (C,) each, fp32."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var.float() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().float()
    bias = -layer.running_mean.float() * scale
    return scale, bias if layer.bias is None else bias + layer.bias.detach().float()


def _center(layer: nn.Module) -> Tensor:
    running_mean: Tensor = layer.running_mean  # type: ignore[assignment]
    return running_mean.float()


def _added_up(sums: list[Tensor]) -> list[Tensor]:
    """Add up what fused layers left in parts (P, 2, C), all of them at once; other sums (2, C) stay as they are."""
    parts = [run for run in sums if run.dim() == 3]
    if not parts:
        return sums
    from mmzsq.synthesis.kernels import SumRows

    totals = iter(SumRows.apply(torch.cat(parts, dim=2)).split([run.shape[2] for run in parts], dim=1))
    return [next(totals) if run.dim() == 3 else run for run in sums]


def _is_replaceable(layer: _BatchNorm) -> bool:
    return type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) and not layer.training and 'forward' not in vars(layer)


def _activations_behind(detector: nn.Module) -> dict[nn.Module, nn.Module]:
    """The activation of each BatchNorm layer whose output nothing else reads, where it can be fused."""
    found: dict[nn.Module, nn.Module] = {}
    for block in detector.modules():
        if type(block) is not ConvModule or block.order != ('conv', 'norm', 'act'):
            continue
        norm, activation = getattr(block, 'norm', None), getattr(block, 'activate', None)
        if not isinstance(norm, nn.Module) or not isinstance(activation, nn.Module):
            continue
        if type(activation) in FUSED_ACTIVATIONS:
            found[norm] = activation
    return found


def _identity(features: Tensor) -> Tensor:
    return features


def _spread(counts: list[int], runs: list[_BatchNorm]) -> Tensor:
    """The count of each run for each of its channels, made without a wait for the device."""
    return torch.cat([torch.full_like(_center(run), count) for run, count in zip(runs, counts, strict=True)])


def _average(values: Tensor, runs: list[_BatchNorm], layers: list[_BatchNorm]) -> Tensor:
    """Mean over the runs of each layer of values (sum of channels over runs,)."""
    parts: dict[_BatchNorm, list[Tensor]] = {layer: [] for layer in layers}
    for run, part in zip(runs, values.split([run.num_features for run in runs]), strict=True):
        parts[run].append(part)
    return torch.cat([torch.stack(parts[layer]).mean(0) for layer in layers])
