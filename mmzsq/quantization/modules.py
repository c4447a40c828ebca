# SPDX-License-Identifier: Apache-2.0
"""Quantized layers: float layers whose weight and input pass through quantizers.

A quantized layer is a subclass of its float class with two more children. All parameters keep their names, and a float
checkpoint loads into it. :func:`register_quantized` adds a class; :func:`quantized_class` looks it up by the class of
the float layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar, cast

import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers as mmcv_layers
from torch import Tensor, nn

from mmzsq.quantization.quantizers import LSQ

_QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {}
Class = TypeVar('Class', bound='type[QuantizedLayer]')


class QuantizedLayer(nn.Module):
    """Mixin of all quantized layers.

    Attributes:
        weight_quantizer: Quantizer of the weight. It is called with :meth:`filters`.
        input_quantizer: Quantizer of the input.
        can_set_filters: Whether :meth:`set_filters` works: whether filters are the weight, in any arrangement.
    """

    can_set_filters: ClassVar[bool] = True

    weight: Tensor
    weight_quantizer: LSQ
    input_quantizer: LSQ

    def filters(self) -> Tensor:
        """Return the weight as the layer applies it, with the output channels first, (C_out, ...)."""
        return self.applied_weight()

    def set_filters(self, filters: Tensor) -> None:
        """Set the weight so that :meth:`filters` returns the given tensor, up to rounding by its factors.

        Args:
            filters: Tensor in the shape of :meth:`filters`. Layers with ``can_set_filters=False`` take none.
        """
        scale = input_scale(self) if learned_log_scale(self) is not None else None
        self.weight.data.copy_(filters if scale is None else scaled_weight(self, 1 / scale, filters))

    def applied_weight(self) -> Tensor:
        """Return the weight, multiplied by the learned factors of the input channels if the layer has any."""
        log_scale = learned_log_scale(self)
        return self.weight if log_scale is None else scaled_weight(self, log_scale.exp())

    def add_quantizers(self, weight_quantizer: LSQ, input_quantizer: LSQ) -> None:
        """Set the quantizers of the layer.

        Args:
            weight_quantizer: Quantizer of the weight. It is moved to the layer's device and train or eval mode.
            input_quantizer: Quantizer of the input; likewise.
        """
        device = self.weight.device
        self.weight_quantizer = weight_quantizer.to(device).train(self.training)
        self.input_quantizer = input_quantizer.to(device).train(self.training)


def register_quantized(*float_classes: type[nn.Module]) -> Callable[[Class], Class]:
    """Class decorator: register the quantized class of ``float_classes``.

    Args:
        float_classes: Classes whose ``forward`` the decorated class repeats with quantized weight and input. Each is a
            base of the decorated class, or computes the same as one.
    """

    def register(cls: Class) -> Class:
        _QUANTIZED_CLASSES.update(dict.fromkeys(float_classes, cls))
        return cls

    return register


# mmcv's wrappers differ from torch's layers only for empty inputs on torch < 1.5.
@register_quantized(nn.Conv2d, mmcv_layers.Conv2d)
class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution with quantized weight and input."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        weight = self.weight_quantizer(self.filters())
        return self._conv_forward(self.input_quantizer(input), weight, self.bias)


@register_quantized(nn.Conv1d)
class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """Convolution over a sequence, with quantized weight and input."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C_in, L) into (N, C_out, L')."""
        weight = self.weight_quantizer(self.filters())
        return self._conv_forward(self.input_quantizer(input), weight, self.bias)


@register_quantized(nn.ConvTranspose2d, mmcv_layers.ConvTranspose2d)
class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """Transposed convolution with quantized weight and input."""

    def filters(self) -> Tensor:
        """Return the weight as (C_out, C_in / groups, kH, kW); it is stored as (C_in, C_out / groups, kH, kW)."""
        return self._swap_channels(self.applied_weight())

    def set_filters(self, filters: Tensor) -> None:
        """Set the weight from filters, (C_out, C_in / groups, kH, kW)."""
        super().set_filters(self._swap_channels(filters))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W'); ``output_size`` selects one of several possible sizes."""
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            self.input_quantizer(input),
            self._swap_channels(self.weight_quantizer(self.filters())),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding,
            self.groups,
            self.dilation,
        )

    def _swap_channels(self, weight: Tensor) -> Tensor:
        """Exchange input and output channels within each group. Applied twice, this is the identity."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


@register_quantized(nn.Linear, mmcv_layers.Linear)
class QuantLinear(QuantizedLayer, nn.Linear):
    """Linear layer with quantized weight and input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.filters()), self.bias)


def quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    """Return the quantized class of a float layer.

    Only the exact class counts. A subclass must be registered itself: its ``forward`` may compute something else
    (weight standardization), or other code may read its weight without calling it (the output projection of
    ``nn.MultiheadAttention``).

    Args:
        layer: Any module.

    Returns:
        The quantized class, or ``None`` if none is registered.
    """
    return _QUANTIZED_CLASSES.get(type(layer))


def quantizable_bases(layer: nn.Module) -> list[str]:
    """Return the names of the registered classes that the class of ``layer`` derives from."""
    return [cls.__name__ for cls in type(layer).__mro__[1:] if cls in _QUANTIZED_CLASSES]


def make_quantized(layer: nn.Module, cls: type[QuantizedLayer]) -> QuantizedLayer:
    """Turn a float layer into a quantized one, in place. Call ``add_quantizers`` on it afterwards.

    The class of the object changes, as in ``torch.nn.utils.parametrize``. Hooks stay, and so do all references to the
    layer, such as those of heads that share one convolution among levels.

    Args:
        layer: The float layer.
        cls: Its quantized class.

    Returns:
        ``layer`` itself.
    """
    layer.__class__ = cls
    return cast(QuantizedLayer, layer)


def input_scale(layer: nn.Module) -> Tensor | None:
    """Return the factors that a layer divides its input channels by, (C,), or ``None`` if it has none.

    They are differentiable if they are learned. See :mod:`mmzsq.quantization.equalize`.
    """
    log_scale = learned_log_scale(layer)
    fixed: Tensor | None = getattr(layer, 'input_scale', None)
    return log_scale.exp() if fixed is None and log_scale is not None else fixed


def learned_log_scale(layer: nn.Module) -> Tensor | None:
    """Return the parameter that holds the logarithms of learned input factors, (C,), or ``None``."""
    return getattr(layer, 'log_input_scale', None)


def stored_input_scale(layer: nn.Module) -> Tensor | None:
    """Return the tensor that a checkpoint holds for the input factors of a layer, or ``None``."""
    log_scale = learned_log_scale(layer)
    return input_scale(layer) if log_scale is None else log_scale


def scaled_weight(layer: QuantizedLayer, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weight of a layer with the weights of each input channel multiplied by a factor.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        scale: Factor of each input channel, (C,).
        weight: Weight to take in place of the layer's own, in its shape.
    """
    weight = layer.weight if weight is None else weight
    if isinstance(layer, QuantLinear):
        return weight * scale
    if isinstance(layer, QuantConvTranspose2d):
        return weight * scale.view(-1, 1, 1, 1)
    groups: int = layer.groups  # type: ignore[assignment]
    return (weight.unflatten(0, (groups, -1)).flatten(3) * scale.view(groups, 1, -1, 1)).view_as(weight)


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer."""
    return cast(Tensor, layer.weight)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Yield the names and quantized layers of a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
