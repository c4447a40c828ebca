# SPDX-License-Identifier: Apache-2.0
"""Operators of ``mmcv._ext`` that detectors call, computed by torchvision.

``import mmcv.ops`` looks up all of MMCV's compiled operators, but a detector calls few of them. The functions here, in
:mod:`mmzsq.mmcv_ops.deform_conv_ops` and in :mod:`mmzsq.mmcv_ops.pytorch_ops` have the signatures of MMCV 2.1.0.
:func:`mmzsq.compat.provide_mmcv_ops` installs the module object that holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.mmcv_ops import deform_conv_ops, pytorch_ops
from mmzsq.mmcv_ops.pytorch_ops import at_least_fp32

EXTENSION = 'mmcv._ext'
INSTALL_FULL = (
    'Install the full package in its place: '
    'pip uninstall mmcv-lite && pip install -U openmim && mim install mmcv==2.1.0'
)


class MissingOperatorError(UserError):
    """An operator was called that only the full MMCV has.

    Args:
        operator: Its name in ``mmcv._ext``.
        part: Which part of the detector called it, for the message.
    """

    def __init__(self, operator: str, part: str = 'this detector') -> None:
        super().__init__(
            f'{part} needs full mmcv: it calls the compiled operator {operator!r}, not in mmcv-lite. {INSTALL_FULL}'
        )
        self.operator = operator


class TorchvisionOps(ModuleType):
    """The module ``mmcv._ext``: any name can be looked up; calling one not served raises."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, 'MMCV operators served by torchvision (see mmzsq.compat).')
        # find_spec raises for a module without a spec; by the missing loader MMEngine sees that
        # this one is not compiled.
        self.__spec__ = ModuleSpec(EXTENSION, loader=None)
        self.nms = nms
        self.roi_align_forward = roi_align_forward
        self.roi_align_backward = roi_align_backward
        self.deform_conv_forward = deform_conv_ops.deform_conv_forward
        self.deform_conv_backward_input = deform_conv_ops.deform_conv_backward_input
        self.deform_conv_backward_parameters = deform_conv_ops.deform_conv_backward_parameters
        self.modulated_deform_conv_forward = deform_conv_ops.modulated_deform_conv_forward
        self.modulated_deform_conv_backward = deform_conv_ops.modulated_deform_conv_backward
        self.softnms = pytorch_ops.softnms
        self.nms_match = pytorch_ops.nms_match
        self.sigmoid_focal_loss_forward = pytorch_ops.sigmoid_focal_loss_forward
        self.sigmoid_focal_loss_backward = pytorch_ops.sigmoid_focal_loss_backward
        self.ms_deform_attn_forward = pytorch_ops.ms_deform_attn_forward
        self.ms_deform_attn_backward = pytorch_ops.ms_deform_attn_backward

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function that raises when called; private names are absent, as in any module."""
        if name.startswith('_'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise MissingOperatorError(name)

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression with the signature of MMCV's ``nms``.

    Args:
        boxes: Boxes as xyxy pixels, (N, 4), any floating type.
        scores: Scores, (N,).
        iou_threshold: A box that overlaps a better one by more than this is dropped.
        offset: 0, or 1 when a box from x1 to x2 is ``x2 - x1 + 1`` pixels wide.

    Returns:
        Indices of the boxes kept, best first, (K,), int64.
    """
    boxes = at_least_fp32(boxes)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign into ``output``, with the signature of MMCV's operator.

    torchvision has no bf16 kernel and sums fp16 in fp16, so both are computed in fp32.

    Args:
        input: Feature map, (N, C, H, W).
        rois: Image index and box as xyxy in pixels of the network input, (R, 5).
        output: Written: (R, C, aligned_height, aligned_width).
        argmax_y: Unused, of max pooling.
        argmax_x: Unused, of max pooling.
        aligned_height: Bins in y.
        aligned_width: Bins in x.
        spatial_scale: Feature map pixels per pixel of the network input.
        sampling_ratio: Samples per bin and axis; 0 takes as many as the bin has pixels.
        pool_mode: 1 for average.
        aligned: Whether pixel centers are at half-integer coordinates.

    Raises:
        UserError: If ``pool_mode`` asks for maximum, which torchvision does not have.
    """
    if pool_mode != 1:
        raise UserError(f"roi_align with pool_mode='max' is not in mmcv-lite: set it to 'avg'. {INSTALL_FULL}")
    features = at_least_fp32(input)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(features, rois.to(features.dtype), size, spatial_scale, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward`, whose arguments these are, with respect to ``input``.

    torchvision's backward has no bf16 kernel, so 16-bit types are computed in fp32.

    Args:
        grad_output: Gradient of ``output``, (R, C, aligned_height, aligned_width).
        rois: As in the forward pass.
        argmax_y: Unused.
        argmax_x: Unused.
        grad_input: Written: gradient of ``input``, (N, C, H, W).
        aligned_height: As in the forward pass, like all that follow.
        aligned_width: Bins in x.
        spatial_scale: Feature map pixels per pixel of the network input.
        sampling_ratio: Samples per bin and axis.
        pool_mode: 1 for average.
        aligned: Whether pixel centers are at half-integer coordinates.
    """
    grad = at_least_fp32(grad_output)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )
