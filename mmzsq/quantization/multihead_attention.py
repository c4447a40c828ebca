# SPDX-License-Identifier: Apache-2.0
"""``nn.MultiheadAttention`` decomposed into layers: projections of queries, keys, values and of the output.

PyTorch's module stores the weights of the three input projections as one parameter. It reads them, and the weight of
its output layer, without calling a layer. :func:`decompose_attention` makes it call layers that have the same
parameters under the same names. They are then found, traced and quantized like all other layers.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mmzsq.quantization.attention import QuantizedAttention, register_quantized_attention
from mmzsq.quantization.modules import QuantizedLayer, QuantLinear, register_quantized

PROJECTIONS = ('query_projection', 'key_projection', 'value_projection')
SEPARATE_WEIGHTS = ('q_proj_weight', 'k_proj_weight', 'v_proj_weight')
"""Parameters of a module whose keys or values differ from its queries in the number of channels."""

register_quantized(NonDynamicallyQuantizableLinear)(QuantLinear)


class Projection(nn.Module):
    """Input projection of an attention module. It reads the parameters of that module and owns none.

    Args:
        attention: The attention module.
        index: 0 for queries, 1 for keys, 2 for values.
    """

    in_float_model: ClassVar[bool] = False

    def __init__(self, attention: nn.MultiheadAttention, index: int) -> None:
        super().__init__()
        # The tuple keeps the module from becoming a child of its own child.
        self._attention = (attention,)
        self.index = index

    @property
    def weight(self) -> Tensor:
        """The weight, (embed_dim, in_channels): a part of the attention module's parameter."""
        attention = self._attention[0]
        if attention.in_proj_weight is None:
            return cast(Tensor, getattr(attention, SEPARATE_WEIGHTS[self.index]))
        return attention.in_proj_weight.chunk(3)[self.index]

    @property
    def bias(self) -> Tensor | None:
        """The bias, (embed_dim,), or ``None``: a part of the attention module's parameter."""
        bias = self._attention[0].in_proj_bias
        return None if bias is None else bias.chunk(3)[self.index]

    def requires_grad_(self, requires_grad: bool = True) -> Projection:
        """Freeze or unfreeze the attention module's parameters and the quantizers of this projection."""
        for parameter in self._attention[0].parameters(recurse=False):
            parameter.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_channels) to (..., embed_dim)."""
        return F.linear(x, self.weight, self.bias)


@register_quantized(Projection)
class QuantProjection(QuantizedLayer, Projection):
    """Input projection with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_channels) to (..., embed_dim)."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class DecomposedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that calls layers for its projections; created by :func:`decompose_attention`."""

    query_projection: Projection
    key_projection: Projection
    value_projection: Projection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the same as ``nn.MultiheadAttention``, with the same arguments.

        Args:
            query: (L, N, E), or (N, L, E) if ``batch_first``, or (L, E).
            key: (S, N, E_k), (N, S, E_k) or (S, E_k).
            value: (S, N, E_v), (N, S, E_v) or (S, E_v).
            key_padding_mask: (N, S) or (S,). A boolean mask is True for ignored keys; a float mask is added to the
                scores.
            need_weights: Whether to return the attention weights.
            attn_mask: (L, S) or (N * heads, L, S), boolean or float as ``key_padding_mask``.
            average_attn_weights: Whether to average the returned weights over heads.
            is_causal: Ignored: a hint that ``attn_mask`` is causal.

        Returns:
            The output, shaped as ``query`` with E channels, and the attention weights, (N, L, S) or (N, heads, L, S),
            or ``None``.
        """
        batched = query.dim() == 3
        sources = [source if batched else source.unsqueeze(1 - self.batch_first) for source in (query, key, value)]
        projected = (
            projection(source)
            for projection, source in zip(
                (self.query_projection, self.key_projection, self.value_projection), sources, strict=True
            )
        )
        queries, keys, values = (
            (source if self.batch_first else source.transpose(0, 1)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for source in projected
        )
        scores = self._query_key(queries * self.head_dim**-0.5, keys.transpose(2, 3))
        if attn_mask is not None:
            added = _to_additive(attn_mask, scores)
            scores = scores + (added.view(scores.shape) if added.dim() == 3 else added)
        if key_padding_mask is not None:
            scores = scores + _to_additive(key_padding_mask, scores).view(len(scores), 1, 1, -1)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = self._weights_values(weights, values).transpose(1, 2).flatten(2)
        output = self.out_proj(mixed if self.batch_first else mixed.transpose(0, 1))
        if average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output.squeeze(1 - self.batch_first), weights.squeeze(0)
        return output, weights if need_weights else None

    def _query_key(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries @ keys

    def _weights_values(self, weights: Tensor, values: Tensor) -> Tensor:
        return weights @ values


@register_quantized_attention(DecomposedMultiheadAttention)
class QuantMultiheadAttention(QuantizedAttention, DecomposedMultiheadAttention):
    """Multi-head attention with quantized matrix products."""

    def _query_key(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.query_key(queries, keys)

    def _weights_values(self, weights: Tensor, values: Tensor) -> Tensor:
        return self.probability_value(weights, values)


def decompose_attention(model: nn.Module) -> None:
    """Decompose every ``nn.MultiheadAttention`` of a model into layers, in place.

    The outputs of the model stay the same. Only modules of the exact class are changed, and only those without
    ``add_bias_kv`` and ``add_zero_attn``: what these append to keys and values passes through no layer.

    ``nn.TransformerEncoderLayer`` then calls its layers in eval mode too. Without gradients, PyTorch would compute it
    by one operator that reads the weights of all its layers.

    Args:
        model: Any model.
    """
    for module in list(model.modules()):
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = DecomposedMultiheadAttention
            for index, name in enumerate(PROJECTIONS):
                setattr(module, name, Projection(module, index).train(module.training))
        if isinstance(module, nn.TransformerEncoderLayer):
            # Read for the choice of that operator alone; 0 is an activation function that it lacks.
            module.activation_relu_or_gelu = 0


def _to_additive(mask: Tensor, scores: Tensor) -> Tensor:
    """Convert a mask to the type of the scores, to be added to them: -inf where a boolean mask is True."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float('-inf'))
