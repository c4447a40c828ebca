# SPDX-License-Identifier: Apache-2.0
"""Quantized attention: matrix products of two activations, with both operands quantized.

Attention multiplies queries by keys and probabilities by values inside its ``forward``, where there is no layer to
replace. An adapter repeats the ``forward`` of one attention class and computes each product by a :class:`QuantMatmul`.
:func:`register_quantized_attention` registers it. Softmax and the terms added before it stay float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar, cast

from torch import Tensor, nn

from mmzsq.quantization.quantizers import LSQ

_QUANTIZED_ATTENTION: dict[type[nn.Module], type[QuantizedAttention]] = {}
Class = TypeVar('Class', bound='type[QuantizedAttention]')


class QuantMatmul(nn.Module):
    """Matrix product of two activations, in float until :meth:`add_quantizers` is called.

    Attributes:
        left_quantizer: Quantizer of the left operand, or ``None``.
        right_quantizer: Quantizer of the right operand, or ``None``.
    """

    in_float_model: ClassVar[bool] = False

    left_quantizer: LSQ | None
    right_quantizer: LSQ | None

    def __init__(self) -> None:
        super().__init__()
        self.left_quantizer = None
        self.right_quantizer = None

    def add_quantizers(self, left: LSQ, right: LSQ) -> None:
        """Set the quantizers of both operands."""
        self.left_quantizer = left
        self.right_quantizer = right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N)."""
        if self.left_quantizer is not None and self.right_quantizer is not None:
            left, right = self.left_quantizer(left), self.right_quantizer(right)
        return left @ right


class QuantizedAttention(nn.Module):
    """Mixin of all attention adapters.

    Attributes:
        query_key: Product of the scaled queries and the transposed keys.
        probability_value: Product of the softmax output and the values.
    """

    query_key: QuantMatmul
    probability_value: QuantMatmul

    def add_quantizers(self, query: LSQ, key: LSQ, probability: LSQ, value: LSQ) -> None:
        """Set the quantizers of all four operands, and move them to the module's device and train or eval mode."""
        device = next(self.parameters()).device
        query, key, probability, value = (
            quantizer.to(device).train(self.training) for quantizer in (query, key, probability, value)
        )
        self.query_key.add_quantizers(query, key)
        self.probability_value.add_quantizers(probability, value)


def register_quantized_attention(*float_classes: type[nn.Module]) -> Callable[[Class], Class]:
    """Class decorator: register the adapter of ``float_classes``.

    Args:
        float_classes: Classes whose ``forward`` the adapter repeats. Each is a base of the adapter.
    """

    def register(cls: Class) -> Class:
        _QUANTIZED_ATTENTION.update(dict.fromkeys(float_classes, cls))
        return cls

    return register


def quantized_attention_class(module: nn.Module) -> type[QuantizedAttention] | None:
    """Return the adapter of an attention module, or ``None``.

    Only the exact class counts, since a subclass may compute something else.
    """
    return _QUANTIZED_ATTENTION.get(type(module))


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is attention of a known class, with or without an adapter."""
    return isinstance(module, (nn.MultiheadAttention, *_QUANTIZED_ATTENTION))


def make_quantized_attention(module: nn.Module, cls: type[QuantizedAttention]) -> QuantizedAttention:
    """Turn an attention module into its adapter, in place. Call ``add_quantizers`` on it afterwards.

    Args:
        module: The float module.
        cls: Its adapter.

    Returns:
        ``module`` itself.
    """
    module.__class__ = cls
    adapter = cast(QuantizedAttention, module)
    adapter.query_key = QuantMatmul().train(module.training)
    adapter.probability_value = QuantMatmul().train(module.training)
    return adapter
