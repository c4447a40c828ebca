# SPDX-License-Identifier: Apache-2.0
"""Differentiable batch statistics (mean and variance) of the inputs of a detector's BatchNorm layers.

:class:`BatchNormStatisticsCollector` collects them during a forward. On CUDA, one kernel computes the statistics,
BatchNorm in eval mode, and the activation that follows (:mod:`mmzsq.synthesis.kernels`). Elsewhere a hook collects
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from mmzsq.fused_kernels import HAS_TRITON, fused_kernels_enabled
from mmzsq.patching import patched_forwards

FUSED_ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.SiLU: 2}
"""Maps the exact class of an activation to its number in the fused kernel."""

MAX_CHANNELS = 4096
"""Limit of the fused kernel, which holds one value of every channel at once."""


class BatchNormStatistics(NamedTuple):
    """Batch statistics of all layers that ran, concatenated in order of execution.

    Attributes:
        mean: Means of the inputs over (N, H, W), fp32, shape (sum of channels,).
        variance: Biased variances, fp32, shape (sum of channels,).
        layers: The layers, in the same order.
    """

    mean: Tensor
    variance: Tensor
    layers: list[_BatchNorm]


class BatchNormStatisticsCollector:
    """Collects batch statistics of the inputs of a detector's BatchNorm layers.

    Statistics are kept as sums: for each run of a layer, over (N, H, W), the sum of ``x - c`` and of ``(x - c)^2``,
    where c is the running mean of the channel. The fused kernel leaves partial sums (P, 2, C), one for each of its P
    programs; other sums have shape (2, C).
    """

    def __init__(self) -> None:
        # Runs of each layer since the last collect(): sums, and the number of values in each sum.
        self._runs: dict[_BatchNorm, list[tuple[Tensor, int]]] = {}
        self._handles: list[RemovableHandle] = []
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._patches = ExitStack()
        self._active = False
        # Centers and counts of each channel, by the layers that ran and their counts.
        self._constants: dict[tuple[tuple[_BatchNorm, int], ...], tuple[Tensor, Tensor]] = {}

    def attach(self, detector: nn.Module) -> None:
        """Start collecting; layers of a head shared between pyramid levels may run several times in one forward.

        Args:
            detector: Frozen, in eval mode. Layers without running statistics are ignored.
        """
        on_gpu = next(detector.parameters()).is_cuda
        fused = on_gpu and HAS_TRITON and fused_kernels_enabled()
        activations = _activations_behind(detector) if fused else {}
        for layer in batch_norm_layers(detector):
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
        """Stop collecting, and discard everything collected; may be called repeatedly."""
        self._pause()
        for handle in self._handles:
            handle.remove()
        self._handles, self._forwards = [], {}
        self._runs.clear()
        self._constants.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is collected, and patched layers have their original ``forward``.

        Unlike after :meth:`detach`, memory that a captured CUDA graph reads stays allocated.
        """
        self._pause()
        try:
            yield
        finally:
            self._resume()

    def reset(self) -> None:
        """Discard the statistics since the last :meth:`collect`."""
        self._runs.clear()

    def _pause(self) -> None:
        self._active = False
        self._patches.close()

    def _resume(self) -> None:
        self._active = True
        self._patches.enter_context(patched_forwards(self._forwards))

    def collect(self) -> BatchNormStatistics | None:
        """Return the statistics since the last call and discard them; None if no layer ran.

        The statistics of a layer that ran several times are averaged over its runs.
        """
        if not self._runs:
            return None
        layers = list(self._runs)
        runs = [layer for layer, of_layer in self._runs.items() for _ in of_layer]
        sums = _total_sums([sums for of_layer in self._runs.values() for sums, _ in of_layer])
        counts = [count for of_layer in self._runs.values() for _, count in of_layer]
        self._runs.clear()
        key = tuple(zip(runs, counts, strict=True))
        if key not in self._constants:
            self._constants[key] = (torch.cat([_center(run) for run in runs]), _channel_counts(counts, runs))
        center, count = self._constants[key]
        total, squares = torch.cat(sums, dim=1)
        distance = total / count
        mean, variance = center + distance, squares / count - distance.square()
        if len(runs) > len(layers):
            mean, variance = (_average(values, runs, layers) for values in (mean, variance))
        return BatchNormStatistics(mean, variance.clamp(min=0), layers)

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._active:
            return
        self._store_statistics(layer, *batch_statistics(inputs[0]), _center(layer))

    def _store_sums(self, layer: nn.Module, sums: Tensor, count: int) -> None:
        """Store the sums of one run.

        Args:
            layer: The layer that ran.
            sums: Sums (2, C) or partial sums (P, 2, C); see the class.
            count: Number of values in each sum.
        """
        self._runs.setdefault(layer, []).append((sums, count))  # type: ignore[arg-type]

    def _store_statistics(self, layer: nn.Module, mean: Tensor, variance: Tensor, center: Tensor) -> None:
        distance = mean - center
        self._store_sums(layer, torch.stack((distance, variance + distance.square())), 1)

    def _joint_forward(self, layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
        scale, bias = _affine(layer)
        center = _center(layer)

        def forward(features: Tensor) -> Tensor:
            output, mean, variance = _BatchNormWithStatistics.apply(features, scale, bias)
            self._store_statistics(layer, mean, variance, center)
            return output

        return forward

    def _fused_forward(self, layer: _BatchNorm, activation: int) -> Callable[[Tensor], Tensor]:
        from mmzsq.synthesis.kernels import BatchNormActivation

        scale, bias = _affine(layer)
        center = _center(layer)

        def forward(features: Tensor) -> Tensor:
            output, partial = BatchNormActivation.apply(features, center, scale, bias, activation)
            self._store_sums(layer, partial, features.numel() // features.shape[1])
            return output

        return forward


def batch_norm_layers(detector: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of ``detector`` that have running statistics, in order of registration."""
    return [
        module
        for module in detector.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel, in fp32 for any type of ``features``.

    Args:
        features: Shape (N, C, ...).

    Returns:
        Mean and variance, shape (C,) each.
    """
    mean, variance = _BatchStatistics.apply(features)
    return mean, variance


class _BatchStatistics(torch.autograd.Function):
    """Batch statistics in one pass over the features, with a backward in one pass."""

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
    """BatchNorm in eval mode together with the batch statistics of its input, by PyTorch operators only.

    The backward of ``nn.BatchNorm2d`` changes the layout of channels_last gradients. Mixed layouts then slow down the
    rest of the backward on a GPU, starting with the convolution before the layer.

    Args:
        features: Shape (N, C, H, W).
        scale: Scale of each channel, (C,), fp32.
        bias: Bias of each channel, (C,), fp32.

    Returns:
        ``features * scale + bias``, and the mean and biased variance of ``features``, (C,) each, fp32. ``scale`` and
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

    On CUDA, the operators of SyncBatchNorm accumulate bf16 features in fp32 without copying them.
    """
    if features.is_cuda:
        mean, inverse_deviation = torch.batch_norm_stats(features, 0.0)
        # Of equal values, for example of two single pixels in bf16, the operator returns 0, not infinity.
        variance = inverse_deviation.square().reciprocal()
        return mean, torch.where(inverse_deviation > 0, variance, 0.0)
    # Takes a third of the time of var_mean, which reduces several dimensions at once.
    mean, variance = torch.batch_norm_update_stats(features.float(), None, None, 0.0)
    return mean, variance


def _statistics_backward(features: Tensor, mean: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
    """Gradient of ``features``, given those of their mean and variance."""
    count = features.numel() // features.shape[1]
    return _scaled(features, 2 * grad_variance / count, grad_mean / count, mean)


def _scaled(features: Tensor, scale: Tensor, bias: Tensor, center: Tensor | None = None) -> Tensor:
    """Return ``(features - center) * scale + bias`` for each channel, in the type of ``features``; center 0 if None."""
    center = torch.zeros_like(scale) if center is None else center
    if features.is_cuda:
        return torch.batch_norm_elemt(features, scale, bias, center, torch.ones_like(scale), 0.0)
    shape = (1, -1, *[1] * (features.dim() - 2))
    return ((features - center.view(shape)) * scale.view(shape) + bias.view(shape)).to(features.dtype)


def _is_channels_last(features: Tensor) -> bool:
    return features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)


def _affine(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and bias of each channel of a BatchNorm layer in eval mode, (C,) each, fp32."""
    assert layer.running_mean is not None and layer.running_var is not None
    scale = (layer.running_var.float() + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().float()
    bias = -layer.running_mean.float() * scale
    return scale, bias if layer.bias is None else bias + layer.bias.detach().float()


def _center(layer: nn.Module) -> Tensor:
    running_mean: Tensor = layer.running_mean  # type: ignore[assignment]
    return running_mean.float()


def _total_sums(sums: list[Tensor]) -> list[Tensor]:
    """Reduce partial sums (P, 2, C) to (2, C), all in one kernel; sums (2, C) are returned unchanged."""
    parts = [run for run in sums if run.dim() == 3]
    if not parts:
        return sums
    from mmzsq.synthesis.kernels import SumRows

    totals = iter(SumRows.apply(torch.cat(parts, dim=2)).split([run.shape[2] for run in parts], dim=1))
    return [next(totals) if run.dim() == 3 else run for run in sums]


def _is_replaceable(layer: _BatchNorm) -> bool:
    return type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm) and not layer.training and 'forward' not in vars(layer)


def _activations_behind(detector: nn.Module) -> dict[nn.Module, nn.Module]:
    """Map each BatchNorm layer to the activation that alone reads its output, if that can be fused."""
    activations: dict[nn.Module, nn.Module] = {}
    for block in detector.modules():
        if type(block) is not ConvModule or block.order != ('conv', 'norm', 'act'):
            continue
        norm, activation = getattr(block, 'norm', None), getattr(block, 'activate', None)
        if not isinstance(norm, nn.Module) or not isinstance(activation, nn.Module):
            continue
        if type(activation) in FUSED_ACTIVATIONS:
            activations[norm] = activation
    return activations


def _identity(features: Tensor) -> Tensor:
    return features


def _channel_counts(counts: list[int], runs: list[_BatchNorm]) -> Tensor:
    """Repeat the count of each run for each of its channels, without synchronizing with the device."""
    return torch.cat([torch.full_like(_center(run), count) for run, count in zip(runs, counts, strict=True)])


def _average(values: Tensor, runs: list[_BatchNorm], layers: list[_BatchNorm]) -> Tensor:
    """Average values (sum of channels over runs,) over the runs of each layer; returns (sum of channels,)."""
    parts: dict[_BatchNorm, list[Tensor]] = {layer: [] for layer in layers}
    for run, part in zip(runs, values.split([run.num_features for run in runs]), strict=True):
        parts[run].append(part)
    return torch.cat([torch.stack(parts[layer]).mean(0) for layer in layers])
