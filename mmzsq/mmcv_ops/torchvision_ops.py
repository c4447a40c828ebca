# SPDX-License-Identifier: Apache-2.0
"""The module ``mmcv._ext`` for mmcv-lite, with operators based on torchvision.

``import mmcv.ops`` looks up all of MMCV's compiled operators, but detectors call only a few of them. The functions in
this module, in :mod:`mmzsq.mmcv_ops.deform_conv_ops` and in :mod:`mmzsq.mmcv_ops.pytorch_ops` have the signatures of
MMCV 2.1.0.
:func:`mmzsq.compat.provide_mmcv_ops` installs the module object that contains them.
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
    'Install the full package instead: pip uninstall mmcv-lite && pip install -U openmim && mim install mmcv==2.1.0'
)


class MissingOperatorError(UserError):
    """Raised when a detector calls an operator that only the full MMCV provides.

    Args:
        operator: Name of the operator in ``mmcv._ext``.
        part: Name of the calling component in the message.
    """

    def __init__(self, operator: str, part: str = 'this detector') -> None:
        super().__init__(
            f'{part} needs full mmcv: it calls the compiled operator {operator!r}, which mmcv-lite does not have. '
            f'{INSTALL_FULL}'
        )
        self.operator = operator


class TorchvisionOps(ModuleType):
    """The module ``mmcv._ext``. Any operator can be looked up; calling an unsupported one raises an error."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, 'MMCV operators based on torchvision (see mmzsq.compat).')
        # find_spec raises an error for a module without a spec. The missing loader tells MMEngine that this module is
        # not compiled.
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
        """Return a function that raises an error when called; private names do not exist."""
        if name.startswith('_'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise MissingOperatorError(name)

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression with the signature of MMCV's ``nms``.

    Args:
        boxes: Boxes in xyxy pixels, (N, 4), any floating-point dtype.
        scores: Scores, (N,).
        iou_threshold: A box is dropped if its IoU with a better box exceeds this.
        offset: 0, or 1 if the width of a box from x1 to x2 is ``x2 - x1 + 1`` pixels.

    Returns:
        Indices of the kept boxes, sorted by descending score, (K,), int64.
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

    torchvision has no bf16 kernel and accumulates fp16 in fp16, so both are computed in fp32.

    Args:
        input: Feature map, (N, C, H, W).
        rois: Image index and box in xyxy pixels of the network input, (R, 5).
        output: Receives the result, (R, C, aligned_height, aligned_width).
        argmax_y: Unused; for max pooling.
        argmax_x: Unused; for max pooling.
        aligned_height: Number of bins in y.
        aligned_width: Number of bins in x.
        spatial_scale: Feature map pixels per pixel of the network input.
        sampling_ratio: Sampling points per bin and axis; 0 uses one per pixel of the bin.
        pool_mode: 1 for average pooling.
        aligned: Whether pixel centers are at half-integer coordinates.

    Raises:
        UserError: If ``pool_mode`` selects max pooling, which torchvision does not provide.
    """
    if pool_mode != 1:
        raise UserError(
            f"mmcv-lite does not have roi_align with pool_mode='max'. Set pool_mode='avg', or: {INSTALL_FULL}"
        )
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
    """Gradient of :func:`roi_align_forward` with respect to ``input``.

    torchvision's backward has no bf16 kernel, so 16-bit types are computed in fp32.

    Args:
        grad_output: Gradient of ``output``, (R, C, aligned_height, aligned_width).
        rois: As in the forward pass.
        argmax_y: Unused.
        argmax_x: Unused.
        grad_input: Receives the gradient of ``input``, (N, C, H, W).
        aligned_height: As in the forward pass.
        aligned_width: As in the forward pass.
        spatial_scale: As in the forward pass.
        sampling_ratio: As in the forward pass.
        pool_mode: As in the forward pass.
        aligned: As in the forward pass.
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
