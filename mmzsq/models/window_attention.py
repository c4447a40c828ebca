# SPDX-License-Identifier: Apache-2.0
"""Window attention of Swin with quantized matrix products, used by ``zsq.quantizer.attention``.

This adapts MMDetection's ``WindowMSA``. Its linear layers are quantized like any others. The softmax and the relative
position bias stay in floating point.
"""

from __future__ import annotations

from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from mmzsq.quantization import QuantizedAttention, register_quantized_attention


@register_quantized_attention(WindowMSA)
class QuantWindowMSA(QuantizedAttention, WindowMSA):
    """Window attention whose queries, keys, values and probabilities are quantized."""

    qkv: nn.Module
    proj: nn.Module
    softmax: nn.Module
    attn_drop: nn.Module
    proj_drop: nn.Module
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (num_windows * N, L, C), L the patches of one window.
            mask: (num_windows, L, L), added to the logits of shifted windows: 0, or -100 for two patches that must not
                attend to each other. None if windows are not shifted.

        Returns:
            (num_windows * N, L, C).
        """
        windows, length, channels = x.shape
        q, k, v = self.qkv(x).view(windows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = self.query_key(q * self.scale, k.transpose(-2, -1))
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        logits = logits + bias.view(length, length, -1).permute(2, 0, 1)
        if mask is not None:
            # (images, windows of an image, heads, L, L)
            logits = logits.unflatten(0, (-1, len(mask))) + mask[:, None]
            logits = logits.flatten(0, 1)
        probability = self.attn_drop(self.softmax(logits))
        x = self.probability_value(probability, v).transpose(1, 2).reshape(windows, length, channels)
        return self.proj_drop(self.proj(x))
