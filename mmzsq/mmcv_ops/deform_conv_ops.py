# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions of ``mmcv._ext``, v1 (Dai et al., 2017) and v2 (Zhu et al., 2019), based on torchvision.

Both libraries use the same layout of offsets and masks. torchvision has one operator for both versions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32

SYNC_DEBUG_ERROR = 2
"""Value of ``torch.cuda.get_sync_debug_mode`` for ``'error'``."""

MAX_OFFSET = 2.0**20
"""Limit of the offsets in pixels, far beyond the size of any feature map."""


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Deformable convolution (v1) into ``output``, with the signature of MMCV's operator.

    Args:
        input: Feature map, (N, C, H, W).
        weight: Shape (C_out, C / group, kH, kW).
        offset: Offset of each kernel position for each output pixel, y before x, in pixels of ``input``,
            (N, deformable_group * kH * kW * 2, H_out, W_out).
        output: Receives the result, (N, C_out, H_out, W_out).
        columns: Unused buffer.
        ones: Unused buffer.
        geometry: ``dH``, ``dW`` (strides), ``padH``, ``padW``, ``dilationH``, ``dilationW``, ``group`` and
            ``deformable_group``; ``kH``, ``kW`` and ``im2col_step`` are ignored.
    """
    output.copy_(_deform_conv(input, weight, offset, None, None, _geometry_v1(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Gradient of :func:`deform_conv_forward` with respect to ``input`` and ``offset``.

    Args:
        input: As in the forward pass.
        offset: As in the forward pass.
        grad_output: Gradient of ``output``.
        grad_input: Receives the gradient of ``input``.
        grad_offset: Receives the gradient of ``offset``.
        weight: As in the forward pass.
        columns: Unused.
        geometry: As in the forward pass.
    """
    grads = _deform_conv_backward(grad_output, input, weight, offset, None, None, _geometry_v1(geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float = 1,
    **geometry: int,
) -> None:
    """Gradient of :func:`deform_conv_forward` with respect to ``weight``.

    Args:
        input: As in the forward pass.
        offset: As in the forward pass.
        grad_output: Gradient of ``output``.
        grad_weight: Receives the gradient of ``weight``, which does not depend on the values of ``weight``.
        columns: Unused.
        ones: Unused.
        scale: Factor applied to the gradient.
        geometry: As in the forward pass.
    """
    grads = _deform_conv_backward(grad_output, input, grad_weight, offset, None, None, _geometry_v1(geometry))
    grad_weight.copy_(scale * grads[1])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Modulated deformable convolution (v2) into ``output``, with the signature of MMCV's operator.

    DyHead passes offsets and masks of the level above, whose maps are larger than the output. They are read like the
    compiled operator reads them: the memory of each image is interpreted with the output's height and width.

    Args:
        input: Feature map, (N, C, H, W).
        weight: Shape (C_out, C / group, kH, kW).
        bias: Shape (C_out,); empty without ``with_bias``.
        ones: Unused buffer.
        offset: As in :func:`deform_conv_forward`.
        mask: Factor of each kernel position for each output pixel, (N, deformable_group * kH * kW, H_out, W_out).
        output: Receives the result, (N, C_out, H_out, W_out).
        columns: Unused.
        geometry: ``stride_h``, ``stride_w``, ``pad_h``, ``pad_w``, ``dilation_h``, ``dilation_w``, ``group``,
            ``deformable_group`` and ``with_bias``; ``kernel_h`` and ``kernel_w`` are ignored.
    """
    offset, mask = (_read_as(tensor, output) for tensor in (offset, mask))
    output.copy_(
        _deform_conv(input, weight, offset, mask, bias if geometry['with_bias'] else None, _geometry_v2(geometry))
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: int,
) -> None:
    """Gradients of :func:`modulated_deform_conv_forward` with respect to all of its tensors.

    Args:
        input: As in the forward pass.
        weight: As in the forward pass.
        bias: As in the forward pass.
        ones: Unused.
        offset: As in the forward pass.
        mask: As in the forward pass.
        columns: Unused.
        grad_input: Receives the gradient of ``input``.
        grad_weight: Receives the gradient of ``weight``.
        grad_bias: Receives the gradient of ``bias`` if ``with_bias`` is set.
        grad_offset: Receives the gradient of ``offset``.
        grad_mask: Receives the gradient of ``mask``.
        grad_output: Gradient of ``output``.
        geometry: As in the forward pass.
    """
    bias_used = bias if geometry['with_bias'] else None
    offset, mask = (_read_as(tensor, grad_output) for tensor in (offset, mask))
    grads = _deform_conv_backward(grad_output, input, weight, offset, mask, bias_used, _geometry_v2(geometry))
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    for written, grad in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        # Values that were not read get a gradient of 0.
        written.zero_()
        _read_as(written, grad_output).copy_(grad)
    if bias_used is not None:
        grad_bias.copy_(grads[4])


def _read_as(tensor: Tensor, output: Tensor) -> Tensor:
    """View the start of each image's memory in ``tensor`` (N, C, H, W) as (C, H_out, W_out)."""
    size = output.shape[2:]
    if tensor.shape[2:] == size or tensor[0, 0].numel() < size.numel():
        return tensor
    values = tensor.flatten(1)[:, : tensor.shape[1] * size.numel()]
    return values.unflatten(1, (tensor.shape[1], *size))


def _geometry_v1(geometry: dict[str, int]) -> list[int]:
    names = ('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group')
    return [geometry[name] for name in names]


def _geometry_v2(geometry: dict[str, int]) -> list[int]:
    names = ('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w', 'group', 'deformable_group')
    return [geometry[name] for name in names]


def _deform_conv(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    """Call torchvision's operator. It has no bf16 kernel, so 16-bit types are computed in fp32."""
    operands = _deform_operands(input, weight, offset, mask, bias)
    (output,) = on_default_stream(
        lambda *tensors: (torch.ops.torchvision.deform_conv2d(*tensors, *geometry, mask is not None),), *operands
    )
    return output


def _deform_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of input, weight, offset, mask and bias."""
    operands = _deform_operands(input, weight, offset, mask, bias)
    grad = grad_output.to(operands[0].dtype).contiguous()
    return on_default_stream(  # type: ignore[return-value]
        lambda *tensors: torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, mask is not None),
        grad,
        *operands,
    )


def on_default_stream(operator: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> tuple[Tensor, ...]:
    """Call an operator whose kernels ignore the current CUDA stream, as torchvision's deformable convolution does.

    It launches them on the default stream. On any other stream, they would read operands that are not computed yet, and
    memory that is reused already.

    Args:
        operator: Returns its results as tensors.
        operands: Its arguments, all on one device.

    Raises:
        RuntimeError: If synchronization is forbidden (``torch.cuda.set_sync_debug_mode('error')``), as before the
            capture of a CUDA graph. Kernels on the default stream cannot be captured.
    """
    device = operands[0].device
    if device.type != 'cuda':
        return operator(*operands)
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current == default:
        return operator(*operands)
    if torch.cuda.get_sync_debug_mode() == SYNC_DEBUG_ERROR:
        raise RuntimeError("torchvision's deformable convolution ignores the current CUDA stream")
    default.wait_stream(current)
    with torch.cuda.stream(default):
        results = operator(*operands)
    current.wait_stream(default)
    # The allocator must not reuse memory of one stream while the other still works on it.
    for operand in operands:
        operand.record_stream(default)
    for result in results:
        result.record_stream(current)
    return results


def _deform_operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """Convert all five operands to one dtype; missing ones are replaced as in torchvision's Python wrapper."""
    input = at_least_fp32(input)
    # torchvision converts positions to 32-bit integers, which overflow. Positions this far away read 0 in any case.
    offset = offset.to(input.dtype).clamp(-MAX_OFFSET, MAX_OFFSET)
    absent_mask = input.new_zeros(len(input), 1)
    absent_bias = input.new_zeros(len(weight))
    others = (
        weight,
        offset,
        absent_mask if mask is None else mask,
        absent_bias if bias is None else bias,
    )
    return [operand.to(input.dtype).contiguous() for operand in (input, *others)]
