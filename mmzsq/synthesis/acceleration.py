# SPDX-License-Identifier: Apache-2.0
"""A frozen detector's layers in the form that a GPU runs fast, for the time of a synthesis.

Nothing here changes what is computed beyond rounding; :class:`Acceleration` puts other ``forward`` methods on layers
and takes them off again.

* Weights are cast to the precision of the step once, not in every step.
* Output channels that are no multiple of 8 (255 of a COCO head) keep a convolution from the tensor cores: they are
  padded, and the padding is cut off.
* A strided convolution of an image (3 channels: unaligned again, and most of its cost is moving them) becomes a dense
  one of the image's blocks, stride x stride pixels each, with zeros up to the next multiple of 8 channels.
* Max pooling of stride 1 and nearest upsampling are kernels of our own (:mod:`mmzsq.synthesis.layer_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers as mmcv_layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmzsq.fused_kernels import HAS_TRITON

ALIGNMENT = 8
"""Channels that tensor cores want in multiples of, in 16-bit types."""

CONVOLUTIONS = (nn.Conv2d, mmcv_layers.Conv2d)
LINEARS = (nn.Linear, mmcv_layers.Linear)
MAX_POOLS = (nn.MaxPool2d, mmcv_layers.MaxPool2d)
"""Exact classes: a subclass may compute something else."""

MAX_POOL_SIDE = 15
"""Of a window of max pooling: a place in it is one byte, and 255 is no place."""


class Acceleration:
    """Fast convolutions and linear layers of a detector, to be switched on and off.

    Args:
        detector: Frozen, in eval mode, on a GPU; its layers get gradients for their inputs only.
        dtype: What they compute in.
    """

    def __init__(self, detector: nn.Module, dtype: torch.dtype) -> None:
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for module in detector.modules():
            if isinstance(module, nn.Conv2d) and _is_plain(module):
                self._forwards[module] = fast_convolution(module, dtype)
            elif isinstance(module, nn.Linear) and type(module) in LINEARS:
                bias = None if module.bias is None else module.bias.detach().to(dtype)
                self._forwards[module] = partial(_linear, weight=module.weight.detach().to(dtype), bias=bias)
            elif type(module) is nn.Upsample and module.mode == 'nearest':
                self._forwards[module] = partial(_upsample, module)
            elif isinstance(module, nn.MaxPool2d) and _keeps_size(module):
                self._forwards[module] = partial(_max_pool, module)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the layers are fast."""
        for module, forward in self._forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self._forwards:
                del module.forward


def _is_plain(layer: nn.Conv2d) -> bool:
    return type(layer) in CONVOLUTIONS and layer.padding_mode == 'zeros' and isinstance(layer.padding, tuple)


def _keeps_size(layer: nn.MaxPool2d) -> bool:
    """Whether ``layer`` takes the maximum of an odd square around each pixel, and returns that alone."""
    side = layer.kernel_size
    return (
        type(layer) in MAX_POOLS
        and isinstance(side, int)
        and side % 2 == 1
        and side <= MAX_POOL_SIDE
        and layer.stride in (1, (1, 1))
        and layer.padding in (side // 2, (side // 2,) * 2)
        and layer.dilation in (1, (1, 1))
        and not layer.return_indices
    )


def fast_convolution(layer: nn.Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what ``layer`` does, in ``dtype``.

    Args:
        layer: Its padding is a pair of numbers and zeros.
        dtype: Of the computation and the result.
    """
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    stride = layer.stride[0]
    is_stem = (
        layer.in_channels < ALIGNMENT
        and layer.groups == 1
        and layer.stride == (stride, stride)
        and stride > 1
        and layer.dilation == (1, 1)
    )
    if is_stem:
        weight, padding = blocks_of_weight(weight, stride, layer.padding)  # type: ignore[arg-type]
        weight = F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % ALIGNMENT))
        weight = _for_gpu(weight, dtype)
        return partial(_stem, layer=layer, weight=weight, bias=bias, block=stride, padding=padding)
    missing = -layer.out_channels % ALIGNMENT if layer.groups == 1 else 0
    if missing:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
        bias = None if bias is None else F.pad(bias, (0, missing))
    return partial(
        _convolution,
        weight=_for_gpu(weight, dtype),
        bias=bias,
        channels=layer.out_channels,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def blocks_of_weight(weight: Tensor, block: int, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Rewrite a convolution of stride ``block`` for images whose blocks of pixels are channels.

    Args:
        weight: Shape (C_out, C_in, K_h, K_w).
        block: Height and width of a block, and the stride.
        padding: Rows and columns of zeros around the image.

    Returns:
        A weight (C_out, C_in * block^2, K_h', K_w') for stride 1 and inputs as ``pixel_unshuffle`` makes them; and the
        blocks of zeros that it wants left, right, above and below.
    """
    padding_h, kernel_h, (above, below) = _blocks_of_side(weight.shape[2], block, padding[0])
    padding_w, kernel_w, (left, right) = _blocks_of_side(weight.shape[3], block, padding[1])
    behind_h, behind_w = (
        kernel * block - zeros - size
        for kernel, zeros, size in zip((kernel_h, kernel_w), (padding_h, padding_w), weight.shape[2:], strict=True)
    )
    weight = F.pad(weight, (padding_w, behind_w, padding_h, behind_h))
    return F.pixel_unshuffle(weight, block), (left, right, above, below)


def _blocks_of_side(size: int, block: int, padding: int) -> tuple[int, int, tuple[int, int]]:
    """Zeros in front of a kernel of ``size`` pixels, its size in blocks, and blocks of padding before and behind."""
    before = -(-padding // block)
    zeros = before * block - padding
    kernel = -(-(zeros + size) // block)
    # So many that an image of h blocks gives h + (2 padding - size) // block + 1 outputs, as the strided one does.
    return zeros, kernel, (before, (2 * padding - size) // block + kernel - before)


def _for_gpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def _has_kernel(x: Tensor, places: int) -> bool:
    """Whether a kernel runs where ``x`` (N, C, H, W) is, with so many places, which it takes as 32-bit numbers."""
    if not (x.is_cuda and HAS_TRITON and x.dim() == 4):
        return False
    from mmzsq.synthesis.kernels import MAX_VALUES

    return places <= MAX_VALUES


def _max_pool(layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    if not _has_kernel(x, x.numel()):
        return type(layer).forward(layer, x)
    from mmzsq.synthesis.layer_kernels import MaxPool

    assert isinstance(layer.kernel_size, int)
    return MaxPool.apply(x, layer.kernel_size)


def _upsample(layer: nn.Upsample, x: Tensor) -> Tensor:
    factor = layer.scale_factor
    if isinstance(factor, float) and factor.is_integer() and _has_kernel(x, x.numel() * int(factor) ** 2):
        from mmzsq.synthesis.layer_kernels import Upsample

        return Upsample.apply(x, int(factor))
    # Autocast would copy to fp32, and with it all that is concatenated.
    with torch.autocast(x.device.type, enabled=False):
        return nn.Upsample.forward(layer, x)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    output = F.conv2d(x.to(weight.dtype), weight, bias, stride, padding, dilation, groups)
    return output if output.shape[1] == channels else _FirstChannels.apply(output, channels)


class _FirstChannels(torch.autograd.Function):
    """The first channels of features, whose gradient keeps the layout: that of a slice would be rearranged.

    Inputs: features (N, C, H, W), channels last; how many channels.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, channels: int) -> Tensor:
        """See the class."""
        ctx.padded = features.shape[1]
        return features[:, :channels]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Zeros behind the gradient."""
        count, channels, *size = grad_output.shape
        shape = (count, ctx.padded, *size)
        grad = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=torch.channels_last)
        grad[:, :channels] = grad_output
        grad[:, channels:] = 0
        return grad, None


def _stem(
    x: Tensor, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None, block: int, padding: tuple[int, int, int, int]
) -> Tensor:
    if x.shape[2] % block or x.shape[3] % block:
        return type(layer).forward(layer, x)
    blocks = _image_blocks(x, block, weight.shape[1], weight.dtype)
    left, right, above, below = padding
    around = (above, left)
    if (left, above) != (right, below):
        blocks, around = F.pad(blocks, padding), (0, 0)
    return F.conv2d(blocks.contiguous(memory_format=torch.channels_last), weight, bias, padding=around)


def _image_blocks(images: Tensor, block: int, channels: int, dtype: torch.dtype) -> Tensor:
    """``pixel_unshuffle`` of images in ``dtype``, with zeros up to so many channels."""
    if _has_kernel(images, images.numel() * channels):
        from mmzsq.synthesis.layer_kernels import ImageBlocks

        return ImageBlocks.apply(images, block, channels, dtype)
    blocks = F.pixel_unshuffle(images.to(dtype), block)
    return F.pad(blocks, (0, 0, 0, 0, 0, channels - blocks.shape[1]))
