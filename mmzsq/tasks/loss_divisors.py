# SPDX-License-Identifier: Apache-2.0
"""Divisors of any detector's own loss that cover all images of one weight update.

A loss is a sum over objects or locations, divided by their number. This module finds the divisors where detectors pass
or apply them, whatever the class of the head:

* the argument ``avg_factor`` of a loss module;
* the number of elements that a loss module, a loss function or ``Tensor.mean`` averages;
* the denominator of a scalar loss in the head.

A first pass without gradients records them for each part (:func:`~mmzsq.update_parts.named_mean`), and the second pass
uses their means. A divisor that MMDetection's ``reduce_mean`` has already averaged must not be averaged again. In the
first pass, :func:`averaged` therefore returns infinity, which reaches all divisors that are computed from it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode

from mmzsq.patching import patched_forwards
from mmzsq.update_parts import is_recording, named_mean, update_mean

LOSSES = 'mmdet.models.losses.'
"""Modules of MMDetection that define loss modules."""

MEANS = (torch.mean, Tensor.mean)

MEAN_LOSSES = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.l1_loss,
    F.mse_loss,
    F.nll_loss,
    F.smooth_l1_loss,
)
"""Functions that return the mean of a loss if ``reduction`` is not given."""

DIVISIONS = (torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__)


def averaged(value: Tensor) -> Tensor:
    """Return the mean of a divisor over all parts; while divisors are recorded, infinity.

    Args:
        value: The divisor of this part, any shape. All parts ask for the same ones in the same order.
    """
    mean = update_mean(value)
    return torch.full_like(mean, math.inf) if is_recording() and mean.is_floating_point() else mean


@contextmanager
def averaged_divisors(detector: nn.Module) -> Iterator[None]:
    """Average the divisors of the losses that ``detector`` computes inside the block over all parts of the update.

    Args:
        detector: Any detector.
    """
    forwards = {
        module: _averaged(name, module)
        for name, module in detector.named_modules()
        if isinstance(module, _Loss) or type(module).__module__.startswith(LOSSES) or _takes_divisor(module)
    }
    with patched_forwards(forwards), _ScalarDivisors():
        yield


_unchanged = False


@contextmanager
def unchanged_divisors() -> Iterator[None]:
    """Average no divisor inside the block; for losses whose divisors are averaged in another way."""
    global _unchanged
    before, _unchanged = _unchanged, True
    try:
        yield
    finally:
        _unchanged = before


class _ScalarDivisors(TorchFunctionMode):
    """Averages the denominators of scalars, and the numbers of elements of means, inside the block."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``, and scale its result if it is divided by a number that differs between parts."""
        result = func(*args, **(kwargs or {}))
        if _unchanged or not isinstance(result, Tensor) or result.dim() or not result.is_floating_point():
            return result
        # Means of constants, such as logged values, stay as they are.
        if not (is_recording() or result.requires_grad):
            return result
        divisor = _divisor(func, args, kwargs or {})
        mean = None if divisor is None else _mean_of(_place(sys._getframe(1)), divisor)
        return result if mean is None else result * (float(divisor) / mean)


def _divisor(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the number that a function divides by: a number or a tensor, or None if it does not divide."""
    if not args or not isinstance(args[0], Tensor):
        return None
    if func in DIVISIONS:
        return args[1] if len(args) == 2 else None
    averages = func in MEANS or (func in MEAN_LOSSES and kwargs.get('reduction', 'mean') == 'mean')
    # The mean of a scalar is the scalar.
    return args[0].numel() if averages and args[0].dim() else None


def _mean_of(name: str, divisor: Any) -> float | None:
    """Return the mean of a divisor over all parts, or None if they are equal or it has none."""
    if isinstance(divisor, Tensor) and (divisor.numel() != 1 or divisor.requires_grad):
        return None
    own = float(divisor)
    if not math.isfinite(own):
        return None
    mean = named_mean(name, own, setting=isinstance(divisor, float))
    return None if mean == 0 or math.isclose(own, mean, rel_tol=1e-9) else mean


def _place(frame: FrameType | None) -> str:
    """Return the file and line outside of PyTorch that a frame was called from."""
    while frame is not None and frame.f_globals.get('__name__', '').startswith('torch'):
        frame = frame.f_back
    return '' if frame is None else f'{frame.f_code.co_filename}:{frame.f_lineno}'


def _takes_divisor(module: nn.Module) -> bool:
    return 'avg_factor' in inspect.signature(module.forward).parameters


def _averaged(name: str, module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a loss module with the mean of its divisor over all parts."""
    forward = module.forward
    signature = inspect.signature(forward)

    def loss(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        divisor = call.arguments.get('avg_factor')
        # A module that takes a divisor averages, unless it can do otherwise.
        default = None if divisor is None else 'mean'
        reduction = call.arguments.get('reduction_override') or getattr(module, 'reduction', default)
        if _unchanged or reduction != 'mean':
            with unchanged_divisors():
                return forward(*args, **kwargs)
        place = f'{name} at {_place(sys._getframe(1))}'
        own = _number_of_elements(module, *call.args[:2]) if divisor is None else divisor
        mean = _mean_of(place, own)
        with unchanged_divisors():
            if mean is None:
                return forward(*args, **kwargs)
            if divisor is not None:
                call.arguments['avg_factor'] = (
                    torch.as_tensor(mean, device=divisor.device) if isinstance(divisor, Tensor) else mean
                )
                return forward(*call.args, **call.kwargs)
            result = forward(*args, **kwargs)
        share = own / mean
        return {key: value * share for key, value in result.items()} if isinstance(result, dict) else result * share

    return loss


def _number_of_elements(module: nn.Module, prediction: Tensor, target: Any = None) -> int:
    """Return the number of elements that a loss module averages."""
    ignored = getattr(module, 'ignore_index', None)
    leaves_out = getattr(module, 'avg_non_ignore', isinstance(module, _Loss))
    if leaves_out and ignored is not None and isinstance(target, Tensor) and not target.is_floating_point():
        return int((target != ignored).sum())
    return prediction.numel()
