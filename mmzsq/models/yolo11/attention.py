# SPDX-License-Identifier: Apache-2.0
"""YOLO11's attention with quantized products: the adapter of :class:`~mmzsq.models.yolo11.layers.SpatialAttention`.

Its convolutions are quantized like any others; this is for ``zsq.quantizer.attention``. Softmax stays float.
"""

from __future__ import annotations

from torch import Tensor

from mmzsq.models.yolo11.layers import SpatialAttention
from mmzsq.quantization import QuantizedAttention, register_quantized_attention


@register_quantized_attention(SpatialAttention)
class QuantSpatialAttention(QuantizedAttention, SpatialAttention):
    """Attention over a map whose queries, keys, values and probabilities are quantized."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        query, key, value = self.split(x)
        probability = self.query_key(query, key).softmax(-1)
        return self.merge(self.probability_value(probability, value), value, x)
