# SPDX-License-Identifier: Apache-2.0
"""Quantized layers: float layers whose weight and input pass through quantizers.

A quantized layer is its float class plus two children, so every parameter keeps its name and a
float checkpoint loads into it. Add a class with :func:`register_quantized`; :func:`quantized_class`
says which one stands for a float layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers as mmcv_layers
from torch import Tensor, nn

from mmzsq.quantization.quantizers import LSQ

_QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {}
Class = TypeVar('Class', bound='type[QuantizedLayer]')


class QuantizedLayer(nn.Module):
    """Mixin of all quantized layers.

    Attributes:
        weight_quantizer: Of ``weight``; its first dimension is the output channels.
        input_quantizer: Of the only input.
    """

    weight: Tensor
    weight_quantizer: LSQ
    input_quantizer: LSQ


def register_quantized(*float_classes: type[nn.Module]) -> Callable[[Class], Class]:
    """Class decorator: let the decorated class stand for ``float_classes``.

    Args:
        float_classes: Classes whose ``forward`` the decorated class repeats with quantized weight
            and input. Each is the class or a base of the decorated one, or differs from such a base
            by nothing that matters here.
    """

    def register(cls: Class) -> Class:
        _QUANTIZED_CLASSES.update(dict.fromkeys(float_classes, cls))
        return cls

    return register


# mmcv's wrappers differ from torch's layers only for empty inputs on torch < 1.5.
@register_quantized(nn.Conv2d, mmcv_layers.Conv2d)
class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W) into (N, C_out, H', W')."""
        weight = self.weight_quantizer(self.weight)
        return self._conv_forward(self.input_quantizer(x), weight, self.bias)


@register_quantized(nn.Linear, mmcv_layers.Linear)
class QuantLinear(QuantizedLayer, nn.Linear):
    """Linear layer with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    """The quantized class of a float layer.

    Only the exact class counts. A subclass may compute something else in its ``forward`` (weight
    standardisation) or be read without it (the output projection of ``nn.MultiheadAttention``), so
    it has to be registered itself.

    Args:
        layer: Any module.

    Returns:
        The class to swap in, or ``None``.
    """
    return _QUANTIZED_CLASSES.get(type(layer))


def quantizable_bases(layer: nn.Module) -> list[str]:
    """Names of the registered classes that ``layer`` derives from without being one of them."""
    return [cls.__name__ for cls in type(layer).__mro__[1:] if cls in _QUANTIZED_CLASSES]


def make_quantized(layer: nn.Module, cls: type[QuantizedLayer], weight_quantizer: LSQ, input_quantizer: LSQ) -> None:
    """Turn a float layer into a quantized one, in place.

    The object stays and its class changes, as ``torch.nn.utils.parametrize`` does it: hooks, and
    whoever else holds the layer (heads that share one convolution among levels), keep the layer
    they know.

    Args:
        layer: The float layer.
        cls: Its quantized class.
        weight_quantizer: Of its weight.
        input_quantizer: Of its input.
    """
    layer.__class__ = cls
    device = weight_of(layer).device
    layer.weight_quantizer = weight_quantizer.to(device).train(layer.training)
    layer.input_quantizer = input_quantizer.to(device).train(layer.training)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer that has one."""
    return cast(Tensor, layer.weight)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and quantized layers of a model, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module
