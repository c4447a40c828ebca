# SPDX-License-Identifier: Apache-2.0
"""Matrix products of two activations, as attention computes them, with both operands quantized.

Attention multiplies queries by keys and probabilities by values inside its ``forward``, where no
layer can be swapped. An adapter repeats the ``forward`` of one attention class with a
:class:`QuantMatmul` in the place of each product; :func:`register_quantized_attention` says which
class it stands for. Softmax itself and what is added before it stay float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor, nn

from mmzsq.quantization.quantizers import LSQ

_QUANTIZED_ATTENTION: dict[type[nn.Module], type[QuantizedAttention]] = {}
Class = TypeVar('Class', bound='type[QuantizedAttention]')


class QuantMatmul(nn.Module):
    """Product of two activations; a plain product until :meth:`add_quantizers`.

    Attributes:
        left_quantizer: Of the left operand.
        right_quantizer: Of the right operand.
    """

    left_quantizer: LSQ | None
    right_quantizer: LSQ | None

    def __init__(self) -> None:
        super().__init__()
        self.left_quantizer = None
        self.right_quantizer = None

    def add_quantizers(self, left: LSQ, right: LSQ) -> None:
        """Quantize both operands from now on."""
        self.left_quantizer = left
        self.right_quantizer = right

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N)."""
        if self.left_quantizer is not None and self.right_quantizer is not None:
            left, right = self.left_quantizer(left), self.right_quantizer(right)
        return left @ right


class QuantizedAttention(nn.Module):
    """Mixin of all adapters.

    Attributes:
        query_key: The product of queries, scaled, and transposed keys.
        probability_value: The product of the softmax output and values.
    """

    query_key: QuantMatmul
    probability_value: QuantMatmul

    def add_quantizers(self, query: LSQ, key: LSQ, probability: LSQ, value: LSQ) -> None:
        """Quantize all four operands from now on, on the module's device and in its mode."""
        device = next(self.parameters()).device
        query, key, probability, value = (
            quantizer.to(device).train(self.training) for quantizer in (query, key, probability, value)
        )
        self.query_key.add_quantizers(query, key)
        self.probability_value.add_quantizers(probability, value)


def register_quantized_attention(*float_classes: type[nn.Module]) -> Callable[[Class], Class]:
    """Class decorator: let the decorated adapter stand for ``float_classes``.

    Args:
        float_classes: Classes whose ``forward`` the adapter repeats, and bases of it.
    """

    def register(cls: Class) -> Class:
        _QUANTIZED_ATTENTION.update(dict.fromkeys(float_classes, cls))
        return cls

    return register


def quantized_attention_class(module: nn.Module) -> type[QuantizedAttention] | None:
    """The adapter of an attention module; only the exact class counts, since a subclass may compute something else."""
    return _QUANTIZED_ATTENTION.get(type(module))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is known to be attention, with an adapter or without."""
    return isinstance(module, (nn.MultiheadAttention, *_QUANTIZED_ATTENTION))


def make_quantized_attention(module: nn.Module, cls: type[QuantizedAttention]) -> QuantizedAttention:
    """Turn an attention module into its adapter, in place; it still needs ``add_quantizers``.

    Args:
        module: The float module.
        cls: Its adapter.

    Returns:
        The same object.
    """
    module.__class__ = cls
    adapter = cast(QuantizedAttention, module)
    adapter.query_key = QuantMatmul().train(module.training)
    adapter.probability_value = QuantMatmul().train(module.training)
    return adapter
