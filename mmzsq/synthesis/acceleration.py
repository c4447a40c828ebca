# SPDX-License-Identifier: Apache-2.0
"""Faster layers of a frozen detector on a GPU, for the duration of a synthesis.

:class:`Acceleration` temporarily replaces the ``forward`` of layers. Results differ only by rounding.

* Weights are cast to the data type of the step once instead of in each step.
* A convolution whose number of output channels is not a multiple of 8 (255 in a COCO head) cannot use tensor cores. Its
  output channels are padded, and the padding is cut off.
* A strided convolution of an image has 3 unaligned input channels, and memory traffic dominates its cost. It is
  replaced by a dense convolution of blocks of stride x stride pixels, padded with zeros to a multiple of 8 channels.
* Max pooling with stride 1 and nearest upsampling use Triton kernels (:mod:`mmzsq.synthesis.layer_kernels`).
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
from mmzsq.patching import patched_forwards

ALIGNMENT = 8
"""Tensor cores need channel counts in multiples of this, for 16-bit types."""

CONVOLUTIONS = (nn.Conv2d, mmcv_layers.Conv2d)
LINEARS = (nn.Linear, mmcv_layers.Linear)
MAX_POOLS = (nn.MaxPool2d, mmcv_layers.MaxPool2d)
"""Exact classes to replace; a subclass may compute something else."""

MAX_POOL_KERNEL_SIZE = 15
"""Limit of the max pooling kernel, which stores a position in the window in one byte and uses 255 for none."""


class Acceleration:
    """Faster forwards of a detector's layers; calling the object gives a context manager that applies them.

    Args:
        detector: Frozen, in eval mode, on a GPU. Its parameters get no gradients.
        dtype: Data type of convolutions and linear layers.
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
            elif isinstance(module, nn.MaxPool2d) and _is_same_size_max_pool(module):
                self._forwards[module] = partial(_max_pool, module)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Use the faster forwards inside the block; blocks may be nested."""
        with patched_forwards(self._forwards):
            yield


def _is_plain(layer: nn.Conv2d) -> bool:
    return type(layer) in CONVOLUTIONS and layer.padding_mode == 'zeros' and isinstance(layer.padding, tuple)


def _is_same_size_max_pool(layer: nn.MaxPool2d) -> bool:
    """Return whether ``layer`` takes the maximum over an odd square around each pixel, and returns no indices."""
    side = layer.kernel_size
    return (
        type(layer) in MAX_POOLS
        and isinstance(side, int)
        and side % 2 == 1
        and side <= MAX_POOL_KERNEL_SIZE
        and layer.stride in (1, (1, 1))
        and layer.padding in (side // 2, (side // 2,) * 2)
        and layer.dilation in (1, (1, 1))
        and not layer.return_indices
    )


def fast_convolution(layer: nn.Conv2d, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the same as a convolution, in ``dtype``.

    Args:
        layer: A convolution with numeric zero padding.
        dtype: Data type of the computation and the result.
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
        weight, padding = weight_for_blocks(weight, stride, layer.padding)  # type: ignore[arg-type]
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


def weight_for_blocks(weight: Tensor, block: int, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Rewrite a convolution of stride ``block`` for inputs whose blocks of pixels were moved to channels.

    Args:
        weight: Shape (C_out, C_in, K_h, K_w).
        block: Height and width of a block, and the stride.
        padding: Rows and columns of zeros around the image.

    Returns: The weight (C_out, C_in * block^2, K_h', K_w') of a convolution of stride 1 on the output of
        ``pixel_unshuffle``; and its padding left, right, above and below, in blocks.
    """
    padding_h, kernel_h, (above, below) = _side_in_blocks(weight.shape[2], block, padding[0])
    padding_w, kernel_w, (left, right) = _side_in_blocks(weight.shape[3], block, padding[1])
    behind_h, behind_w = (
        kernel * block - zeros - size
        for kernel, zeros, size in zip((kernel_h, kernel_w), (padding_h, padding_w), weight.shape[2:], strict=True)
    )
    weight = F.pad(weight, (padding_w, behind_w, padding_h, behind_h))
    return F.pixel_unshuffle(weight, block), (left, right, above, below)


def _side_in_blocks(size: int, block: int, padding: int) -> tuple[int, int, tuple[int, int]]:
    """Convert one side of a kernel to blocks.

    Args:
        size: Kernel size in pixels.
        block: Block size in pixels.
        padding: Padding in pixels.

    Returns:
        Zeros to add before the kernel, in pixels; the kernel size in blocks; the padding before and behind, in blocks.
    """
    before = -(-padding // block)
    zeros = before * block - padding
    kernel = -(-(zeros + size) // block)
    # With this padding, an image of h blocks gives h + (2 padding - size) // block + 1 outputs, as with the stride.
    return zeros, kernel, (before, (2 * padding - size) // block + kernel - before)


def _for_gpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def _can_use_kernel(x: Tensor, num_values: int) -> bool:
    """Return whether a Triton kernel can process ``x`` (N, C, H, W) and index ``num_values`` values by int32."""
    if not (x.is_cuda and HAS_TRITON and x.dim() == 4):
        return False
    from mmzsq.synthesis.kernels import MAX_VALUES

    return num_values <= MAX_VALUES


def _max_pool(layer: nn.MaxPool2d, x: Tensor) -> Tensor:
    if not _can_use_kernel(x, x.numel()):
        return type(layer).forward(layer, x)
    from mmzsq.synthesis.layer_kernels import MaxPool

    assert isinstance(layer.kernel_size, int)
    return MaxPool.apply(x, layer.kernel_size)


def _upsample(layer: nn.Upsample, x: Tensor) -> Tensor:
    factor = layer.scale_factor
    if isinstance(factor, float) and factor.is_integer() and _can_use_kernel(x, x.numel() * int(factor) ** 2):
        from mmzsq.synthesis.layer_kernels import Upsample

        return Upsample.apply(x, int(factor))
    # Autocast would upsample in fp32, and then also convert the tensors concatenated with the result.
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
    """Slice of the first channels whose backward keeps the channels_last layout, unlike that of indexing.

    Inputs: features (N, C, H, W), channels_last, which nothing else reads; number of channels to keep. The result
    shares their memory, but autograd does not know it as a view, so that an activation may change it in place.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, channels: int) -> Tensor:
        """See the class."""
        ctx.padded = features.shape[1]
        kept = features[:, :channels]
        alone = kept.new_empty(0)
        return alone.set_(kept.untyped_storage(), kept.storage_offset(), kept.shape, kept.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Pad the gradient with zeros."""
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
    """``pixel_unshuffle`` of images in ``dtype``, padded with zeros to a number of channels."""
    if _can_use_kernel(images, images.numel() * channels):
        from mmzsq.synthesis.layer_kernels import ImageBlocks

        return ImageBlocks.apply(images, block, channels, dtype)
    blocks = F.pixel_unshuffle(images.to(dtype), block)
    return F.pad(blocks, (0, 0, 0, 0, 0, channels - blocks.shape[1]))
