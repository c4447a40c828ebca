# SPDX-License-Identifier: Apache-2.0
"""Convert state dicts of torchvision's R-CNNs and RetinaNet with ResNet-50 and FPN to MMDetection's names.

Supported are ``fasterrcnn_resnet50_fpn``, ``maskrcnn_resnet50_fpn`` and ``retinanet_resnet50_fpn``, with the names of
any version of torchvision. Class 0 is the background in torchvision. MMDetection's RetinaNet and masks have no such
class, and the class scores of its R-CNNs have it last. The configs are in ``configs/torchvision``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from mmdet.datasets import CocoDataset
from torch import Tensor

from mmzsq.converters.conversion import ConvertedDetector, check_num_classes, to_float32
from mmzsq.errors import UserError

EPS = 1e-5
"""Epsilon of MMDetection's batch norms."""

COCO_OUTPUTS = 91
"""Outputs of torchvision's COCO weights: ids of categories, of which 80 have a name."""
# Category ids up to 90 without a name.
UNNAMED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

RENAMED = (
    (r'backbone\.body\.', 'backbone.'),
    (r'backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)', r'neck.lateral_convs.\1.conv.\2'),
    (r'backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)', r'neck.fpn_convs.\1.conv.\2'),
    (r'backbone\.fpn\.extra_blocks\.p6\.', 'neck.fpn_convs.3.conv.'),
    (r'backbone\.fpn\.extra_blocks\.p7\.', 'neck.fpn_convs.4.conv.'),
    (r'rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)', r'rpn_head.rpn_conv.\1'),
    (r'rpn\.head\.cls_logits\.', 'rpn_head.rpn_cls.'),
    (r'rpn\.head\.bbox_pred\.', 'rpn_head.rpn_reg.'),
    (r'roi_heads\.box_head\.fc6\.', 'roi_head.bbox_head.shared_fcs.0.'),
    (r'roi_heads\.box_head\.fc7\.', 'roi_head.bbox_head.shared_fcs.1.'),
    (r'roi_heads\.box_predictor\.cls_score\.', 'roi_head.bbox_head.fc_cls.'),
    (r'roi_heads\.box_predictor\.bbox_pred\.', 'roi_head.bbox_head.fc_reg.'),
    (r'roi_heads\.mask_head\.(\d)\.0\.', r'roi_head.mask_head.convs.\1.conv.'),
    (r'roi_heads\.mask_predictor\.conv5_mask\.', 'roi_head.mask_head.upsample.'),
    (r'roi_heads\.mask_predictor\.mask_fcn_logits\.', 'roi_head.mask_head.conv_logits.'),
    (r'head\.classification_head\.conv\.(\d)(?:\.0)?\.(weight|bias)', r'bbox_head.cls_convs.\1.conv.\2'),
    (r'head\.regression_head\.conv\.(\d)(?:\.0)?\.(weight|bias)', r'bbox_head.reg_convs.\1.conv.\2'),
    (r'head\.classification_head\.cls_logits\.', 'bbox_head.retina_cls.'),
    (r'head\.regression_head\.bbox_reg\.', 'bbox_head.retina_reg.'),
)
"""Patterns of torchvision's names, at their beginning, and MMDetection's names."""

RETINANET_ANCHORS = 9
"""Anchors of torchvision's RetinaNet at a location: three sizes with three ratios."""


def is_torchvision(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have the names of a detector of torchvision with a ResNet and an FPN."""
    return 'backbone.body.conv1.weight' in tensors and any(name.startswith('backbone.fpn.') for name in tensors)


def convert_torchvision(tensors: Mapping[str, Tensor], num_names: int | None = None) -> ConvertedDetector:
    """Rename the tensors of a detector of torchvision, and move or remove its background class.

    COCO's 91 outputs become its 80 classes. The softmax of an R-CNN then lacks the ten categories without a name,
    which trained weights never predict.

    Batch norms are frozen in torchvision if the state dict has no ``num_batches_tracked``. They have an epsilon of 0
    then, as in torchvision's COCO weights, and 1e-5 otherwise. The weight of the batch norm holds the difference.

    Args:
        tensors: Parameters and buffers under torchvision's names.
        num_names: Number of class names that the user gave; None: unknown. As many as outputs keep all outputs of a
            RetinaNet, whose class 0 may be a class of objects.

    Returns:
        The weights. ``family`` is ``'Faster R-CNN'``, ``'Mask R-CNN'`` or ``'RetinaNet'``, and ``size`` is ``'R50'``.

    Raises:
        UserError: If they are the weights of another detector.
    """
    family = _family(tensors)
    frozen = not any(name.endswith('num_batches_tracked') for name in tensors)
    renamed = {_rename(name): tensor for name, tensor in to_float32(tensors).items()}
    for name in [name for name in renamed if name.endswith('running_var')]:
        norm = name.removesuffix('running_var')
        renamed.setdefault(f'{norm}num_batches_tracked', torch.tensor(0))
        if frozen:
            variance = renamed[name].double()
            # A variance of 0 with an epsilon of 0 has no finite output; the channel is constant.
            factor = torch.sqrt((variance + EPS) / variance.clamp(min=torch.finfo(torch.float).tiny))
            renamed[f'{norm}weight'] = (renamed[f'{norm}weight'].double() * factor).float()
    outputs = _num_outputs(renamed, family)
    if family == 'RetinaNet' and num_names == outputs:
        objects = list(range(outputs))
    elif outputs == COCO_OUTPUTS and num_names in (None, len(CocoDataset.METAINFO['classes'])):
        objects = [index for index in range(1, outputs) if index not in UNNAMED]
    else:
        objects = list(range(1, outputs))
    check_num_classes(len(objects))
    return ConvertedDetector(family, 'R50', len(objects), _select_classes(renamed, family, objects, outputs))


def _family(tensors: Mapping[str, Tensor]) -> str:
    """Tell the supported detectors apart, and refuse all others by name."""
    supported = 'fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn and retinanet_resnet50_fpn of torchvision are supported'
    if 'backbone.body.layer1.0.conv3.weight' not in tensors or 'backbone.body.layer3.6.conv1.weight' in tensors:
        raise UserError(f'these weights have another backbone than ResNet-50: {supported}')
    if tensors['backbone.body.layer1.0.conv2.weight'].shape != (64, 64, 3, 3):
        raise UserError(f'these weights have another backbone than ResNet-50: {supported}')
    if any(name.startswith('head.regression_head.bbox_ctrness') for name in tensors):
        raise UserError(f'these are the weights of an FCOS: {supported}')
    if any(name.startswith(('rpn.head.conv.1.', 'roi_heads.box_head.0.')) for name in tensors):
        raise UserError(f'these are the weights of a _v2 detector of torchvision, which is not supported: {supported}')
    if any(name.startswith('roi_heads.keypoint') for name in tensors):
        raise UserError(f'these are the weights of a Keypoint R-CNN: {supported}')
    if 'head.classification_head.cls_logits.weight' in tensors:
        if 'backbone.fpn.extra_blocks.p6.weight' not in tensors:
            raise UserError(f'these weights have a RetinaNet head, but not its FPN: {supported}')
        # The v2 model computes P6 from the last stage, and has group norms in its head.
        if (
            tensors['backbone.fpn.extra_blocks.p6.weight'].shape[1] != 256
            or 'head.classification_head.conv.0.1.weight' in tensors
        ):
            raise UserError(f'these are the weights of retinanet_resnet50_fpn_v2, which is not supported: {supported}')
        return 'RetinaNet'
    if 'roi_heads.box_predictor.cls_score.weight' not in tensors:
        raise UserError(f'these weights have no box head: {supported}')
    return 'Mask R-CNN' if 'roi_heads.mask_predictor.mask_fcn_logits.weight' in tensors else 'Faster R-CNN'


def _rename(name: str) -> str:
    """Convert a name of torchvision to that of MMDetection. Unknown names stay as they are."""
    # Before torchvision 0.13: mask_fcn1 to mask_fcn4.
    old = re.match(r'roi_heads\.mask_head\.mask_fcn(\d)\.', name)
    if old is not None:
        return f'roi_head.mask_head.convs.{int(old[1]) - 1}.conv.{name[old.end() :]}'
    for pattern, replacement in RENAMED:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def _num_outputs(tensors: Mapping[str, Tensor], family: str) -> int:
    """Return the number of classes with the background."""
    if family == 'RetinaNet':
        return tensors['bbox_head.retina_cls.weight'].shape[0] // RETINANET_ANCHORS
    return tensors['roi_head.bbox_head.fc_cls.weight'].shape[0]


def _select_classes(tensors: dict[str, Tensor], family: str, objects: list[int], outputs: int) -> dict[str, Tensor]:
    """Select the outputs of classes in all predicting layers, with the background last where there is one."""
    selected = dict(tensors)
    for suffix in ('weight', 'bias'):
        if family == 'RetinaNet':
            name = f'bbox_head.retina_cls.{suffix}'
            by_class = tensors[name].unflatten(0, (RETINANET_ANCHORS, outputs))
            selected[name] = by_class[:, objects].flatten(0, 1)
            continue
        name = f'roi_head.bbox_head.fc_cls.{suffix}'
        selected[name] = tensors[name][[*objects, 0]]
        name = f'roi_head.bbox_head.fc_reg.{suffix}'
        selected[name] = tensors[name].unflatten(0, (outputs, 4))[objects].flatten(0, 1)
        if family == 'Mask R-CNN':
            name = f'roi_head.mask_head.conv_logits.{suffix}'
            selected[name] = tensors[name][objects]
    return selected
