# SPDX-License-Identifier: Apache-2.0
"""Quantizers with learned steps: the state around :mod:`mmzsq.quantization.fake_quantize`.

``LSQ`` is Esser et al., "Learned Step Size Quantization", 2019, https://arxiv.org/abs/1902.08153.
``LSQPlus`` also learns the zero point, after Bhalgat et al., "LSQ+", 2020,
https://arxiv.org/abs/2004.09576.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.quantization.fake_quantize import clamp_ste, fake_quantize, quantize, round_ste
from mmzsq.quantization.statistics import ActivationStatistics
from mmzsq.quantization.step_search import Grid, mean_abs_step, search_step
from mmzsq.registry import QUANTIZERS

SCHEMES = ('signed', 'unsigned', 'offset')
INITS = ('mse', 'lsq')
STEPS = ('log', 'linear')
BITS = range(2, 9)
MIN_STEP = 1e-8


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of a few words.

    Raises:
        UserError: Names the key, the value and what is allowed.
    """
    if value not in allowed:
        raise UserError(f'{name} is {value!r}, but must be one of {", ".join(map(repr, allowed))}.')


def check_bits(name: str, value: Any) -> None:
    """Refuse a number of bits outside 2..8.

    Raises:
        UserError: Names the key, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
        raise UserError(f'{name} is {value!r}, but must be an integer from 2 to 8.')


@QUANTIZERS.register_module()
class LSQ(nn.Module):
    """Learned step size quantization of one tensor.

    The steps exist with their final shape from construction, so that an optimizer can be built
    before they have values. ``initialized`` is part of the state dict: a resumed model is not
    calibrated again.

    Args:
        bits: 2 to 8.
        scheme: The integers. ``'signed'``: -2^(b-1) to 2^(b-1) - 1, zero point 0. ``'unsigned'``: 0
            to 2^b - 1, zero point 0. ``'offset'``: 0 to 2^b - 1 with an integer zero point found at
            initialization.
        num_steps: 1, or the number of slices of the first dimension (output channels of a weight),
            each with its step.
        init: ``'mse'`` searches the grid of least squared error, ``'lsq'`` takes 2 * mean|x| /
            sqrt(qmax).
        step: What is learnt: ``'log'`` of the step, which makes the rate relative to the step, or
            the step itself, ``'linear'``, kept positive in the forward.
        grad_scale: Scale the gradients of step and zero point by 1 / sqrt(n * qmax), n the number
            of values that share one step.
        narrow: Leave out -2^(b-1) of ``'signed'``. The integers are then symmetric, and a change of
            sign (folding a BN with negative gamma) keeps them in range.

    Raises:
        UserError: If an argument has a value that is not allowed.
    """

    learns_zero_point: ClassVar[bool] = False

    zero_point: Tensor | None
    initialized: Tensor

    def __init__(
        self,
        bits: int = 8,
        scheme: str = 'signed',
        num_steps: int = 1,
        init: str = 'mse',
        step: str = 'log',
        grad_scale: bool = True,
        narrow: bool = False,
    ) -> None:
        super().__init__()
        check_bits('bits', bits)
        check_choice('scheme', scheme, SCHEMES)
        check_choice('init', init, INITS)
        check_choice('step', step, STEPS)
        if narrow and scheme != 'signed':
            raise UserError(f"narrow=True needs scheme='signed', but scheme is {scheme!r}.")
        self.bits = bits
        self.scheme = scheme
        self.init = init
        self.grad_scale = grad_scale
        self.narrow = narrow
        self.qmin = -(2 ** (bits - 1)) + narrow if scheme == 'signed' else 0
        self.qmax = 2 ** (bits - 1) - 1 if scheme == 'signed' else 2**bits - 1
        self.enabled = True
        self._step_name = f'{step}_step'
        ones = torch.ones(num_steps)
        self.register_parameter(self._step_name, nn.Parameter(ones.log() if step == 'log' else ones))
        self._register_zero_point(torch.zeros(num_steps) if scheme == 'offset' else None)
        self.register_buffer('initialized', torch.tensor(False))
        self._ready = False

    def _register_zero_point(self, zero_point: Tensor | None) -> None:
        self.register_buffer('zero_point', zero_point)

    @property
    def num_steps(self) -> int:
        """Number of steps: 1, or one for each slice of the first dimension."""
        return self._learnt_step.numel()

    @property
    def _learnt_step(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, self._step_name)
        return parameter

    @property
    def step(self) -> Tensor:
        """The steps, positive, fp32 of shape (num_steps,), with gradient to what is learnt."""
        learnt = self._learnt_step.float()
        return learnt.exp() if self._step_name == 'log_step' else clamp_ste(learnt, MIN_STEP)

    @property
    def integer_zero_point(self) -> Tensor | None:
        """The integers that stand for zero, fp32 (num_steps,); ``None`` if they are all zero."""
        # An average of weights may leave the buffer a rounding error beside its integer.
        return None if self.zero_point is None else self.zero_point.round()

    @property
    def ready(self) -> bool:
        """Whether the steps have values.

        A plain bool that mirrors ``initialized``: the buffer is read, which waits for the device,
        only until it is true.
        """
        if not self._ready:
            self._ready = bool(self.initialized)
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``.

        Args:
            x: Any floating type and shape; with several steps, ``x.shape[0]`` is their number.

        Returns:
            Values on the grid in the type of ``x``, or ``x`` itself while ``enabled`` is false.

        Raises:
            UserError: If the steps have no values yet.
        """
        if not self.enabled:
            return x
        if not self.ready:
            raise UserError(
                'A quantizer has no step yet. Run some batches through the model inside `with '
                'mmzsq.quantization.calibrating(model):`, load a quantized checkpoint, or switch '
                'quantization off with `set_quantization(model, False)`.'
            )
        step, zero_point = self._grid_for(x)
        scale = 1.0
        if self.grad_scale:
            scale = 1.0 / math.sqrt(max(x.numel() // self.num_steps, 1) * self.qmax)
        return fake_quantize(x, step, self.qmin, self.qmax, zero_point, scale)

    def quantize(self, x: Tensor) -> Tensor:
        """The integers that :meth:`forward` simulates.

        Args:
            x: As in :meth:`forward`.

        Returns:
            int32 of the shape of ``x``, within ``qmin..qmax``.
        """
        step, zero_point = self._grid_for(x)
        return quantize(x, step, self.qmin, self.qmax, zero_point)

    def _grid_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero point with the dimensions of ``x``."""
        shape = (self.num_steps,) + (1,) * (x.dim() - 1)
        zero_point = self.integer_zero_point
        return self.step.view(shape), None if zero_point is None else zero_point.view(shape)

    @torch.no_grad()
    def grid_of_weight(self, weight: Tensor) -> Grid:
        """The first grid for a weight.

        Args:
            weight: Any shape, with ``num_steps`` slices in its first dimension if ``num_steps >
                1``.

        Returns:
            Step and zero point for :meth:`set_grid`.
        """
        rows = weight.detach().float().reshape(self.num_steps, -1)
        return self._first_grid(rows, rows.amin(1), rows.amax(1), rows.abs().mean(1))

    @torch.no_grad()
    def grid_of_activations(self, seen: ActivationStatistics) -> Grid:
        """The first grid for activations.

        Args:
            seen: Statistics of all values that the quantizer stands for; not empty.

        Returns:
            Step and zero point for :meth:`set_grid`.
        """
        ends = (seen.low.float()[None], seen.high.float()[None], seen.mean_abs.float()[None])
        return self._first_grid(seen.sample[None], *ends)

    def _first_grid(self, rows: Tensor, low: Tensor, high: Tensor, mean_abs: Tensor) -> Grid:
        if self.init == 'mse':
            zero_points = range(self.qmin, self.qmax + 1) if self.scheme == 'offset' else [0]
            return search_step(rows, low, high, self.qmin, self.qmax, zero_points)
        step = mean_abs_step(mean_abs, self.qmax)
        if self.scheme != 'offset':
            return Grid(step, torch.zeros_like(step))
        return Grid(step, (-low / step).round().clamp(self.qmin, self.qmax))

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Give the steps, and the zero points if the scheme has any, their values.

        Args:
            grid: Step and zero point, each of shape (num_steps,).
        """
        log = self._step_name == 'log_step'
        self._learnt_step.copy_(grid.step.log() if log else grid.step)
        if self.zero_point is not None:
            self.zero_point.copy_(grid.zero_point)
        self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    def extra_repr(self) -> str:
        """Bits, scheme and number of steps."""
        return f'bits={self.bits}, scheme={self.scheme!r}, num_steps={self.num_steps}'


@QUANTIZERS.register_module()
class LSQPlus(LSQ):
    """LSQ with a learnt zero point.

    The paper learns a real offset. Here the zero point is learnt in units of one level and rounded
    in the forward with a straight-through gradient, so that zero stays on the grid and what is
    trained is what integer hardware computes. Only ``scheme='offset'`` has a zero point; with the
    others this is :class:`LSQ`.
    """

    learns_zero_point = True

    def _register_zero_point(self, zero_point: Tensor | None) -> None:
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point)

    @property
    def integer_zero_point(self) -> Tensor | None:
        """The learnt zero points, rounded and clamped with a straight-through gradient."""
        if self.zero_point is None:
            return None
        return clamp_ste(round_ste(self.zero_point.float()), self.qmin, self.qmax)
