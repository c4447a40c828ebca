# SPDX-License-Identifier: Apache-2.0
"""Attention of YOLO11 with quantized matrix products, used by ``zsq.quantizer.attention``.

This adapts :class:`~mmzsq.models.yolo11.layers.SpatialAttention`. Its convolutions are quantized like any others. The
softmax stays in floating point.
"""

from __future__ import annotations

from torch import Tensor

from mmzsq.models.yolo11.layers import SpatialAttention
from mmzsq.quantization import QuantizedAttention, register_quantized_attention


@register_quantized_attention(SpatialAttention)
class QuantSpatialAttention(QuantizedAttention, SpatialAttention):
    """Spatial attention whose queries, keys, values and probabilities are quantized."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        query, key, value = self.split(x)
        probability = self.query_key(query, key).softmax(-1)
        return self.merge(self.probability_value(probability, value), value, x)
