# SPDX-License-Identifier: Apache-2.0
"""Run the network of a detector in the precision of autocast, and everything else of its loss in fp32.

Autocast decides operator by operator. In MMDetection's losses this fails in many ways: targets in fp32 are written into
tensors in bf16, ``binary_cross_entropy`` is refused, and box coordinates above 256 pixels lose their fractions. A list
of the functions that need fp32 would miss those of the next head. :func:`autocast_network_only` therefore works the
other way around. It turns autocast off, and on again only inside modules with weights, whose outputs are converted to
fp32. Target assignment, decoding of boxes, matching, and the loss terms thus compute in fp32 on fp32 outputs, in every
head, whatever its methods are called.

:class:`LossPrecision` adds a last net for networks that bf16 breaks: it computes their loss entirely in fp32.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from mmzsq.errors import UserError
from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32
from mmzsq.patching import patched, patched_forwards

PRECISION_ERROR = re.compile(r'dtype|scalar type|data type|autocast|BFloat16|Half|not implemented for', re.IGNORECASE)
"""Matches messages of errors that the precision of a tensor can cause."""


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the data type of autocast on a type of device (``'cuda'``, ``'cpu'``), or None if autocast is off.

    Example:
        >>> autocast_dtype('cpu')
        >>> with torch.autocast('cpu', torch.bfloat16):
        ...     autocast_dtype('cpu')
        torch.bfloat16
    """
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    # Before torch 2.4, each type of device has its own functions.
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


@contextmanager
def autocast_network_only(detector: nn.Module) -> Iterator[None]:
    """Restrict autocast to the layers of a detector inside the block; without autocast, nothing changes.

    The outermost call of ``detector.extract_feat`` or of a module with weights runs under autocast. Its floating-point
    outputs are converted to fp32.

    Args:
        detector: Any detector. Forwards that were replaced before the block are kept inside it.
    """
    device_type = next(detector.parameters()).device.type
    dtype = autocast_dtype(device_type)
    if dtype is None:
        yield
        return
    region = _AutocastRegion(
        partial(torch.autocast, device_type, dtype, cache_enabled=torch.is_autocast_cache_enabled())
    )
    forwards = {module: region.wrap(module.forward) for module in detector.modules() if _has_weights(module)}
    forwards.pop(detector, None)
    extract_feat = getattr(detector, 'extract_feat', None)
    with patched_forwards(forwards), torch.autocast(device_type, enabled=False):
        if extract_feat is None:
            yield
        else:
            with patched(detector, 'extract_feat', region.wrap(extract_feat)):
                yield


@contextmanager
def fp32_only(detector: nn.Module) -> Iterator[None]:
    """Turn autocast off inside the block, and use the layers' own forwards in fp32.

    Args:
        detector: Any detector. Replaced forwards of convolutions and linear layers, which may hold 16-bit weights, are
            put aside.
    """
    forwards: dict[Any, Callable[..., Any]] = {
        module: MethodType(type(module).forward, module)
        for module in detector.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and 'forward' in vars(module)
    }
    with patched_forwards(forwards), torch.autocast(next(detector.parameters()).device.type, enabled=False):
        yield


def to_fp32(nest: Any) -> Any:
    """Return a copy of nested outputs with all 16-bit floating-point tensors converted to fp32.

    Args:
        nest: Tensors in lists, tuples, mappings and ``InstanceData``. Other objects are kept.
    """
    if isinstance(nest, Tensor):
        return at_least_fp32(nest) if nest.is_floating_point() else nest
    if isinstance(nest, BaseDataElement):
        copy = nest.new()
        for name, value in nest.items():
            copy.set_field(to_fp32(value), name, dtype=None)
        return copy
    if isinstance(nest, Mapping):
        return type(nest)({name: to_fp32(value) for name, value in nest.items()})  # type: ignore[call-arg]
    if isinstance(nest, tuple) and hasattr(nest, '_fields'):
        return type(nest)(*map(to_fp32, nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)(map(to_fp32, nest))
    return nest


class LossPrecision:
    """Computes the loss of a frozen detector under autocast, and in fp32 if autocast breaks it.

    A loss falls back to fp32 for good if, under autocast, it raises an error or its first value or first gradient is
    not finite, while fp32 has no such problem. A warning names the reason. Without autocast, the loss is computed as
    it is.

    Args:
        detector: The detector.

    Attributes:
        fp32_reason: The reason why the loss is computed in fp32, or None.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.detector = detector
        self.fp32_reason: str | None = None
        self._checked = False

    def __call__(self, evaluate: Callable[[], Tensor], images: Tensor) -> Tensor:
        """Compute a loss.

        Args:
            evaluate: Returns the loss of ``detector`` for ``images``, a scalar. It may be called twice.
            images: The images that the loss depends on, of any shape.

        Raises:
            Exception: Those of ``evaluate`` in fp32.
        """
        if autocast_dtype(images.device.type) is None:
            return evaluate()
        if self.fp32_reason is not None:
            with fp32_only(self.detector):
                return evaluate()
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            with autocast_network_only(self.detector):
                return evaluate()
        random = _random_states(images.device)
        try:
            with autocast_network_only(self.detector):
                loss = evaluate()
            fault = None if self._checked else _non_finite(loss, images)
        except Exception as error:
            if not self._may_be_caused_by_precision(error):
                raise
            fault = f'{type(error).__name__}: {str(error).splitlines()[0]}' if str(error) else type(error).__name__
        if fault is None:
            self._checked = True
            return loss
        _set_random_states(images.device, random)
        with fp32_only(self.detector):
            loss = evaluate()
        if _non_finite(loss, images) is None:
            self.fp32_reason = fault
            warnings.warn(
                f'the loss of {type(self.detector).__name__} is computed in fp32, because autocast breaks it ({fault})',
                stacklevel=3,
            )
        self._checked = True
        return loss

    def _may_be_caused_by_precision(self, error: Exception) -> bool:
        if isinstance(error, (UserError, ImportError, torch.cuda.OutOfMemoryError)) or 'synchronizing' in str(error):
            return False
        # Later calls run the same code on other labels: errors of other kinds have other causes.
        return not self._checked or bool(PRECISION_ERROR.search(str(error)))


class _AutocastRegion:
    """Functions that run under autocast and return fp32, except in calls from one another."""

    def __init__(self, autocast: Callable[[], Any]) -> None:
        self._autocast = autocast
        self._inside = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with these properties."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                with self._autocast():
                    return to_fp32(function(*args, **kwargs))
            finally:
                self._inside = False

        return run


def _has_weights(module: nn.Module) -> bool:
    """Return whether a module multiplies by weights: whether it has a parameter of two or more dimensions."""
    return not isinstance(module, (_Loss, nn.Embedding)) and any(weight.dim() > 1 for weight in module.parameters())


def _non_finite(loss: Tensor, images: Tensor) -> str | None:
    """Describe the fault of a loss or its gradient; None if both are finite."""
    if not bool(torch.isfinite(loss)):
        return f'the loss is {float(loss.detach())}'
    if loss.requires_grad and images.requires_grad:
        (grad,) = torch.autograd.grad(loss, images, retain_graph=True, allow_unused=True)
        if grad is not None and not bool(torch.isfinite(grad).all()):
            return 'the gradient of the images is not finite'
    return None


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == 'cuda' else None


def _set_random_states(device: torch.device, states: tuple[Tensor, Tensor | None]) -> None:
    cpu_state, device_state = states
    torch.set_rng_state(cpu_state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state, device)
