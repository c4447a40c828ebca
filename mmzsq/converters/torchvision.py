# SPDX-License-Identifier: Apache-2.0
"""Convert state dicts of torchvision's R-CNNs and RetinaNet with ResNet-50 and FPN to MMDetection's names.

Supported are ``fasterrcnn_resnet50_fpn``, ``maskrcnn_resnet50_fpn`` and ``retinanet_resnet50_fpn``, with the names of
any version of torchvision. Class 0 is the background in torchvision. MMDetection's RetinaNet and masks have no such
class, and the class scores of its R-CNNs have it last. The configs are in ``configs/torchvision``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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

OTHER_DETECTORS = (
    (r'backbone\.features\.', 'an SSD'),
    (r'head\.regression_head\.bbox_ctrness', 'an FCOS'),
    (r'roi_heads\.keypoint', 'a Keypoint R-CNN'),
    # These heads have two convolutions, or norms.
    (r'rpn\.head\.conv\.1\.|roi_heads\.box_head\.0\.', 'a fasterrcnn_resnet50_fpn_v2 or maskrcnn_resnet50_fpn_v2'),
    (r'head\.classification_head\.conv\.0\.1\.', 'a retinanet_resnet50_fpn_v2'),
)
"""Patterns of tensor names of detectors that are not supported."""

MAX_GAIN = 1e4
"""Largest gain of a batch norm that an epsilon of 0 may imply. Above it, the model had an epsilon."""

RETINANET_ANCHORS = 9
"""Anchors of torchvision's RetinaNet at a location: three sizes with three ratios."""


def convert_torchvision(
    tensors: Mapping[str, Tensor], num_names: int | None = None, eps: float | None = None
) -> ConvertedDetector:
    """Rename the tensors of a detector of torchvision, and move or remove its background class.

    COCO's 91 outputs become its 80 classes. The softmax of an R-CNN then lacks the ten categories without a name,
    which trained weights never predict.

    MMDetection's batch norms have an epsilon of 1e-5. The weight of a batch norm holds the difference to another one.

    Args:
        tensors: Parameters and buffers under torchvision's names.
        num_names: Number of class names that the user gave; None: unknown. As many as outputs keep all outputs of a
            RetinaNet, whose class 0 may be a class of objects.
        eps: Epsilon of the batch norms; None: derived from the tensors, or else that of torchvision's COCO weights.

    Returns:
        The weights. ``family`` is ``'Faster R-CNN'``, ``'Mask R-CNN'`` or ``'RetinaNet'``, and ``size`` is ``'R50'``.

    Raises:
        UserError: If they are the weights of another detector, or the epsilon does not suit them.
    """
    family = _family(tensors)
    renamed = {_rename(name): tensor for name, tensor in to_float32(tensors).items()}
    norms = [name.removesuffix('running_var') for name in renamed if name.endswith('running_var')]
    eps, note = (eps, '') if eps is not None else _assumed_eps(renamed, norms)
    for norm in norms:
        renamed.setdefault(f'{norm}num_batches_tracked', torch.tensor(0))
        if eps != EPS:
            weight, variance = (renamed[f'{norm}{name}'].double() for name in ('weight', 'running_var'))
            if not bool((_gain(weight, variance, eps)).isfinite().all()):
                raise UserError(f'{norm}running_var holds 0, which does not go with an epsilon of {eps:g}')
            factor = torch.sqrt((variance + EPS) / (variance + eps))
            # A channel with a weight of 0 is constant, whatever its variance.
            renamed[f'{norm}weight'] = torch.where(weight == 0, 0.0, weight * factor).float()
    outputs = _num_outputs(renamed, family)
    if family == 'RetinaNet' and num_names == outputs:
        objects = list(range(outputs))
    elif outputs == COCO_OUTPUTS and num_names in (None, len(CocoDataset.METAINFO['classes'])):
        objects = [index for index in range(1, outputs) if index not in UNNAMED]
    else:
        objects = list(range(1, outputs))
    check_num_classes(len(objects))
    return ConvertedDetector(family, 'R50', len(objects), _select_classes(renamed, family, objects, outputs), note)


def _gain(weight: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Return by how much a batch norm multiplies each channel."""
    return torch.where(weight == 0, 0.0, weight.abs() / torch.sqrt(variance + eps))


def _assumed_eps(tensors: Mapping[str, Tensor], norms: Sequence[str]) -> tuple[float, str]:
    """Choose the epsilon of batch norms, with a sentence if the tensors do not tell it.

    ``BatchNorm2d`` has 1e-5 and counts its batches. ``FrozenBatchNorm2d`` does not count them. It has 1e-5 too, except
    in models made with torchvision's COCO weights, where it has 0.
    """
    if any(f'{norm}num_batches_tracked' in tensors for norm in norms):
        return EPS, ''
    gains = [_gain(tensors[f'{norm}weight'].double(), tensors[f'{norm}running_var'].double(), 0.0) for norm in norms]
    largest = max((float(gain.max()) for gain in gains), default=0.0)
    if not largest <= MAX_GAIN:
        return EPS, ''
    return 0.0, (
        "The epsilon of the frozen batch norms is taken to be 0, as in models made with torchvision's COCO weights. If "
        'the model was made with weights_backbone alone, give --batch-norm-eps 1e-5.'
    )


def _family(tensors: Mapping[str, Tensor]) -> str:
    """Tell the supported detectors apart, and refuse all others by name."""
    for pattern, kind in OTHER_DETECTORS:
        if any(re.match(pattern, name) for name in tensors):
            raise UserError(f'these are the weights of {kind} of torchvision')
    width = tensors.get('backbone.body.layer1.0.conv2.weight')
    bottlenecks = (
        'backbone.body.layer1.0.conv3.weight' in tensors and 'backbone.body.layer3.6.conv1.weight' not in tensors
    )
    if not bottlenecks or width is None or width.shape != (64, 64, 3, 3):
        raise UserError('these weights have another backbone than ResNet-50')
    if not any(name.startswith('backbone.fpn.') for name in tensors):
        raise UserError('these weights have no FPN')
    if 'head.classification_head.cls_logits.weight' in tensors:
        # The v2 model computes P6 from the last stage.
        p6 = tensors.get('backbone.fpn.extra_blocks.p6.weight')
        if p6 is None or p6.shape[1] != 256:
            raise UserError('these weights have a RetinaNet head, but not the FPN of retinanet_resnet50_fpn')
        return 'RetinaNet'
    if 'roi_heads.box_predictor.cls_score.weight' not in tensors:
        raise UserError('these weights have no box head')
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
