# SPDX-License-Identifier: Apache-2.0
"""Quantizers: modules that hold the learned steps and zero points of :mod:`mmzsq.quantization.fake_quantize`.

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
    """Check that a value is one of the allowed words.

    Args:
        name: Name of the setting, for the message.
        value: Its value.
        allowed: The allowed values.

    Raises:
        UserError: If it is not; the message names the setting, the value and the allowed values.
    """
    if value not in allowed:
        raise UserError(f'{name} is {value!r}, but must be one of {", ".join(map(repr, allowed))}.')


def check_bits(name: str, value: Any) -> None:
    """Check that a value is a number of bits from 2 to 8.

    Args:
        name: Name of the setting, for the message.
        value: Its value.

    Raises:
        UserError: If it is not; the message names the setting, the value and the allowed values.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
        raise UserError(f'{name} is {value!r}, but must be an integer from 2 to 8.')


@QUANTIZERS.register_module()
class LSQ(nn.Module):
    """Learned step size quantization of one tensor.

    The steps have their final shape from construction on, so that an optimizer can be built before they have values.
    ``initialized`` is part of the state dict, so a resumed model is not calibrated again.

    Args:
        bits: 2 to 8.
        scheme: Range of the integers. ``'signed'``: -2^(b-1) to 2^(b-1) - 1, zero point 0. ``'unsigned'``: 0 to
            2^b - 1, zero point 0. ``'offset'``: 0 to 2^b - 1 with an integer zero point chosen at initialization.
        num_steps: 1, or one step for each slice of the first dimension (the output channels of a weight).
        init: ``'mse'`` searches the grid with the least squared error, ``'lsq'`` takes 2 * mean|x| / sqrt(qmax).
        step: The learned parameter. ``'log'``: the logarithm of the step, so that the learning rate is relative to the
            step. ``'linear'``: the step itself, which the forward keeps positive.
        grad_scale: Whether to scale the gradients of step and zero point by 1 / sqrt(n * qmax). n is the number of
            elements of the quantized tensor that share one step. For activations it includes the batch dimension; the
            LSQ paper counts the features of a layer. Of a batch that is one part of a weight update, all parts count,
            see ``update_ratio``.
        narrow: Whether ``'signed'`` excludes -2^(b-1). The range is then symmetric, and integers stay in it when their
            sign changes, as by folding a BatchNorm with negative gamma.

    Raises:
        UserError: If an argument has a value that is not allowed.
    """

    learns_zero_point: ClassVar[bool] = False
    in_float_model: ClassVar[bool] = False

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
        # Elements of a whole weight update for each element of an input; training sets it.
        self.update_ratio = 1.0

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
        return self._step_parameter.numel()

    @property
    def _step_parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, self._step_name)
        return parameter

    @property
    def step(self) -> Tensor:
        """The steps, positive, fp32, (num_steps,), differentiable with respect to the learned parameter."""
        parameter = self._step_parameter.float()
        return parameter.exp() if self._step_name == 'log_step' else clamp_ste(parameter, MIN_STEP)

    @property
    def integer_zero_point(self) -> Tensor | None:
        """The integers that represent zero, fp32, (num_steps,); ``None`` if they are all zero."""
        # Averaging weights (EMA) may leave a rounding error in the buffer.
        return None if self.zero_point is None else self.zero_point.round()

    @property
    def ready(self) -> bool:
        """Whether the steps are initialized.

        A plain bool caches ``initialized``: to read the buffer waits for the device, so it is read only until it is
        true.
        """
        if not self._ready:
            self._ready = bool(self.initialized)
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``.

        Args:
            x: Tensor of any floating type and shape. With several steps, ``x.shape[0]`` is their number.

        Returns:
            Values on the grid, in the type of ``x``; ``x`` itself while ``enabled`` is false.

        Raises:
            UserError: If the steps are not initialized.
        """
        if not self.enabled:
            return x
        if not self.ready:
            raise UserError(
                'A quantizer is not initialized. Run some batches through the model inside `with '
                'mmzsq.quantization.calibrating(model):`, load a quantized checkpoint, or switch '
                'quantization off with `set_quantization(model, False)`.'
            )
        step, zero_point = self._grid_for(x)
        scale = 1.0
        if self.grad_scale:
            count = max(x.numel() // self.num_steps, 1)
            if self.update_ratio != 1.0:
                count = max(round(count * self.update_ratio), 1)
            scale = 1.0 / math.sqrt(count * self.qmax)
        return fake_quantize(x, step, self.qmin, self.qmax, zero_point, scale)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers that :meth:`forward` simulates.

        Args:
            x: Tensor, see :meth:`forward`.

        Returns:
            int32 tensor of the shape of ``x``, from ``qmin`` to ``qmax``.
        """
        step, zero_point = self._grid_for(x)
        return quantize(x, step, self.qmin, self.qmax, zero_point)

    def _grid_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return step and zero point, broadcastable to ``x``."""
        shape = (self.num_steps,) + (1,) * (x.dim() - 1)
        zero_point = self.integer_zero_point
        return self.step.view(shape), None if zero_point is None else zero_point.view(shape)

    @torch.no_grad()
    def initial_weight_grid(self, weight: Tensor) -> Grid:
        """Compute the initial grid of a weight.

        Args:
            weight: Tensor of any shape. If ``num_steps > 1``, it has ``num_steps`` slices in its first dimension.

        Returns:
            Step and zero point for :meth:`set_grid`.
        """
        rows = weight.detach().float().reshape(self.num_steps, -1)
        return self._initial_grid(rows, rows.amin(1), rows.amax(1), rows.abs().mean(1))

    @torch.no_grad()
    def initial_activation_grid(self, statistics: ActivationStatistics) -> Grid:
        """Compute the initial grid of activations.

        Args:
            statistics: Statistics of the values to quantize; not empty.

        Returns:
            Step and zero point for :meth:`set_grid`.
        """
        summary = (statistics.low.float()[None], statistics.high.float()[None], statistics.mean_abs.float()[None])
        return self._initial_grid(statistics.sample[None], *summary)

    def _initial_grid(self, rows: Tensor, low: Tensor, high: Tensor, mean_abs: Tensor) -> Grid:
        if self.init == 'mse':
            zero_points = range(self.qmin, self.qmax + 1) if self.scheme == 'offset' else [0]
            return search_step(rows, low, high, self.qmin, self.qmax, zero_points)
        step = mean_abs_step(mean_abs, self.qmax)
        if self.scheme != 'offset':
            return Grid(step, torch.zeros_like(step))
        return Grid(step, (-low / step).round().clamp(self.qmin, self.qmax))

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Set the steps, and the zero points if the scheme has any, and mark the quantizer as initialized.

        Args:
            grid: Step and zero point, each of shape (num_steps,).
        """
        log = self._step_name == 'log_step'
        self._step_parameter.copy_(grid.step.log() if log else grid.step)
        if self.zero_point is not None:
            self.zero_point.copy_(grid.zero_point)
        self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    def extra_repr(self) -> str:
        """Return bits, scheme and number of steps."""
        return f'bits={self.bits}, scheme={self.scheme!r}, num_steps={self.num_steps}'


@QUANTIZERS.register_module()
class LSQPlus(LSQ):
    """LSQ with a learned zero point.

    The paper learns a real offset. Here the zero point is learned in units of one level, and the forward rounds it with
    a straight-through gradient. Zero therefore stays on the grid, and training simulates exactly what integer hardware
    computes. Only ``scheme='offset'`` has a zero point; with the other schemes this class equals :class:`LSQ`.
    """

    learns_zero_point = True

    def _register_zero_point(self, zero_point: Tensor | None) -> None:
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point)

    @property
    def integer_zero_point(self) -> Tensor | None:
        """The learned zero points, rounded and clamped with a straight-through gradient."""
        if self.zero_point is None:
            return None
        return clamp_ste(round_ste(self.zero_point.float()), self.qmin, self.qmax)
