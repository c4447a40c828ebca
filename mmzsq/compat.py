# SPDX-License-Identifier: Apache-2.0
"""What released OpenMMLab packages need on today's PyTorch, each with its reason.

MMEngine 0.10.7, MMDetection 3.3.0 and MMCV 2.1.0 are used as released; nothing of them is forked. :func:`install` runs
when ``mmzsq`` is imported, may run any number of times, and leaves alone whatever works without it:

* ``mmcv.ops`` without a compiler: :func:`provide_mmcv_ops`;
* checkpoints that load with ``weights_only=True``: :func:`allow_mmengine_checkpoints`;
* bases named ``mmzsq::...`` in configs: :func:`register_config_prefix`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torchvision
from mmengine.config import utils as config_utils
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmzsq.errors import UserError

EXTENSION = 'mmcv._ext'


def install() -> None:
    """Apply everything in this module.

    Raises:
        UserError: If no MMCV is installed at all.
    """
    provide_mmcv_ops()
    allow_mmengine_checkpoints()
    register_config_prefix()


def provide_mmcv_ops() -> None:
    """Serve ``mmcv._ext`` from torchvision when MMCV has no compiled operators.

    ``import mmdet.models`` imports ``mmcv.ops``, each file of which looks its operators up in the compiled module
    ``mmcv._ext``. ``mmcv-lite`` has none, and compiling the full package takes over half an hour. Most detectors call
    only ``nms`` and ``roi_align``, which torchvision has. A compiled module, even one that fails to load, is left as it
    is.

    Raises:
        UserError: If no MMCV is installed at all.
    """
    if EXTENSION in sys.modules:
        return
    try:
        compiled = importlib.util.find_spec(EXTENSION)
    except ModuleNotFoundError as error:
        raise UserError('mmcv is not installed. Install it without a compiler: pip install mmcv-lite==2.1.0') from error
    if compiled is None:
        sys.modules[EXTENSION] = TorchvisionOps()


def allow_mmengine_checkpoints() -> None:
    """Name what MMEngine's own checkpoints hold besides tensors, so that torch loads them with ``weights_only=True``.

    MMEngine 0.10.7 saves its message hub in every checkpoint: ``HistoryBuffer`` objects around numpy arrays. torch 2.6
    made ``weights_only=True`` the default of ``torch.load`` and refuses them unless they are declared safe. All that is
    declared here only builds arrays and numbers. Older torch has no such list and nothing is done.
    """
    add_safe_globals = getattr(torch.serialization, 'add_safe_globals', None)
    if add_safe_globals is None:
        return
    multiarray = np.zeros(1).__reduce__()[0].__module__
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in np.typecodes['AllInteger'] + 'efd?']
    add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, reconstruct, scalar, *dtypes])
    # numpy 2 renamed numpy.core to numpy._core: a checkpoint names whichever wrote it.
    for module in {'numpy.core.multiarray', 'numpy._core.multiarray'} - {multiarray}:
        add_safe_globals([(reconstruct, f'{module}._reconstruct'), (scalar, f'{module}.scalar')])


def register_config_prefix() -> None:
    """Let ``_base_`` name this package's configs, as in ``'mmzsq::_base_/zsq_w4a8.py'``.

    MMEngine resolves ``package::path`` for the packages of a fixed table only.
    """
    config_utils.MODULE2PACKAGE.setdefault('mmzsq', 'mmzsq')


class TorchvisionOps(ModuleType):
    """The module ``mmcv._ext`` with the signatures of MMCV's compiled operators and torchvision behind them.

    Every name can be looked up, because ``mmcv.ops`` looks all of its operators up on import; one that is not served
    raises when it is called.
    """

    def __init__(self) -> None:
        super().__init__(EXTENSION, 'MMCV operators served by torchvision (see mmzsq.compat).')
        # Without a spec, importlib.util.find_spec(EXTENSION) raises; without a loader MMEngine knows it is not compiled.
        self.__spec__ = ModuleSpec(EXTENSION, loader=None)
        self.nms = nms
        self.roi_align_forward = roi_align_forward
        self.roi_align_backward = roi_align_backward

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function that raises when called; private names are absent, as in any module."""
        if name.startswith('_'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise UserError(
                f'this model calls the compiled operator {name!r}, which mmcv-lite does not have. Install the full '
                'package in its place: pip uninstall mmcv-lite && pip install mmcv==2.1.0'
            )

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
    boxes = _at_least_fp32(boxes)
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
        aligned: Whether pixel centres are at half-integer coordinates.

    Raises:
        UserError: If ``pool_mode`` asks for maximum, which torchvision does not have.
    """
    if pool_mode != 1:
        raise UserError(
            "roi_align with pool_mode='max' needs compiled operators. Set pool_mode='avg', or: "
            'pip uninstall mmcv-lite && pip install mmcv==2.1.0'
        )
    features = _at_least_fp32(input)
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
    """Gradient of :func:`roi_align_forward` into ``grad_input``, (N, C, H, W); the arguments are as there."""
    grad = _at_least_fp32(grad_output)
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


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
