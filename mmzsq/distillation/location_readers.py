# SPDX-License-Identifier: Apache-2.0
"""Read the maps of MMDetection's dense heads by location.

Most heads follow one contract: class scores, box regression and possibly a factor of the scores, for each level; boxes
are decoded by a prior generator and a box coder. Others have their own decoding, which is repeated here for whole
batches, with gradients and without synchronization. Boxes of heads with an unknown decoding are compared as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import (
    AnchorHead,
    AutoAssignHead,
    CenterNetHead,
    CornerHead,
    FoveaHead,
    GFLHead,
    PAAHead,
    RepPointsHead,
    RTMDetHead,
    RTMDetInsHead,
    SABLRetinaHead,
    SOLOHead,
    SOLOV2Head,
    TOODHead,
    VFNetHead,
    YOLACTHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.dense_heads.anchor_free_head import AnchorFreeHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.centernet_update_head import CenterNetUpdateHead
from mmdet.models.dense_heads.condinst_head import CondInstBboxHead, CondInstMaskHead
from mmdet.models.dense_heads.solo_head import DecoupledSOLOHead
from mmdet.models.dense_heads.yolact_head import YOLACTProtonet
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder, TBLRBBoxCoder
from mmdet.structures.bbox import distance2bbox, get_box_tensor
from torch import Tensor, nn

from mmzsq.boxes import MAX_LOG_RATIO, DeltaCoder
from mmzsq.distillation.base import Outputs
from mmzsq.distillation.location_outputs import (
    Constants,
    LocationOutputs,
    MapsError,
    direct_masks,
    dynamic_masks,
    linear_masks,
    map_sizes,
    rows,
    split_levels,
)

BOX_HEAD, MASK_HEAD = 'bbox_head', 'mask_head'
PROTOTYPES = 'mask_head.protonet'
MASK_FEATURES = 'mask_head.mask_feature_head'

PROBABILITY_EPS = 1e-6
"""Scores that a head returns as probabilities are compared as logits within ``[eps, 1 - eps]``."""

LARGEST_LOG = 10.0
"""Limit of a predicted log size relative to an anchor. It keeps the square of the largest box finite in float32, even
while the steps of a student are not trained."""

GENERIC_DECODING = (BaseDenseHead, PAAHead, YOLACTHead, CondInstBboxHead, RTMDetInsHead)
"""Heads whose ``_predict_by_feat_single`` decodes boxes by prior generator and box coder."""

Read = Callable[[Any, Outputs, Constants], LocationOutputs]


@dataclass(frozen=True)
class LocationReader:
    """How the outputs of a dense head are read.

    Attributes:
        taps: Modules whose outputs are read; the first one is the head.
        read: Makes the outputs by location from the head, the recorded outputs of ``taps`` and constants.
        softmax: Whether classes are a softmax with a background, and not independent.
        objectness: Whether the factor is trained at all locations as the probability of an object.
        compared: Parts that are compared, for the log.
        lost: Parts that are compared in a weaker way or not at all, for the log; empty if there are none.
    """

    taps: tuple[str, ...]
    read: Read
    softmax: bool = False
    objectness: bool = False
    compared: str = 'classes and decoded boxes'
    lost: str = ''


def location_reader(detector: Any) -> LocationReader | None:
    """Return how to read the dense head of ``detector``, or None if it has none of a known kind.

    Args:
        detector: Any detector.
    """
    head = getattr(detector, BOX_HEAD, None)
    if head is None:
        return _mask_reader(getattr(detector, MASK_HEAD, None))
    return _box_reader(head, getattr(detector, MASK_HEAD, None))


def _mask_reader(head: Any) -> LocationReader | None:
    """Return the reader of a head that predicts masks only."""
    if not isinstance(head, SOLOHead):
        return None
    if not _is_sigmoid(head):
        return None
    if isinstance(head, DecoupledSOLOHead):
        return LocationReader(
            (MASK_HEAD,), _read_decoupled_solo, compared='classes', lost='the maps of mask rows and columns as a whole'
        )
    if isinstance(head, SOLOV2Head):
        if head.dynamic_conv_size == 1:
            return LocationReader((MASK_HEAD,), _read_solov2, compared='classes and masks')
        return LocationReader(
            (MASK_HEAD,), _read_solov2, compared='classes', lost='mask kernels, and mask features as a whole'
        )
    return LocationReader((MASK_HEAD,), _read_solo, compared='classes and masks')


def _box_reader(head: Any, mask_head: Any) -> LocationReader | None:
    """Return the reader of a head that predicts boxes."""
    taps = (BOX_HEAD,)
    if isinstance(head, YOLOV3Head):
        if decodes_like(head, YOLOV3Head):
            return LocationReader(taps, _read_yolov3, objectness=True, compared='objectness, classes and decoded boxes')
        return LocationReader(
            taps, _read_yolov3, objectness=True, compared='objectness and classes', lost=_unknown_decoding(head)
        )
    if isinstance(head, YOLOXHead):
        if decodes_like(head, YOLOXHead):
            return LocationReader(taps, _read_yolox, objectness=True, compared='objectness, classes and decoded boxes')
        return LocationReader(
            taps, _read_yolox, objectness=True, compared='objectness and classes', lost=_unknown_decoding(head)
        )
    if isinstance(head, CenterNetHead):
        return LocationReader(taps, _read_centernet)
    if isinstance(head, CornerHead):
        return LocationReader(
            taps, _read_corners, compared='classes of both corners', lost='embeddings and offsets of corners, undecoded'
        )
    if isinstance(head, SABLRetinaHead):
        return LocationReader(
            taps, _read_sabl, not head.use_sigmoid_cls, compared='classes', lost='buckets of box sides, undecoded'
        )
    if not isinstance(head, BaseDenseHead) or not hasattr(head, 'cls_out_channels') or _levels(head) is None:
        return None
    if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
        return None
    softmax = not getattr(head, 'use_sigmoid_cls', True)
    if isinstance(head, TOODHead) and decodes_like(head, TOODHead):
        return LocationReader(taps, _read_tood)
    if isinstance(head, VFNetHead):
        return LocationReader(taps, _read_vfnet, compared='classes and decoded boxes, initial and refined')
    if isinstance(head, RepPointsHead) and decodes_like(head, RepPointsHead):
        return LocationReader(taps, _read_reppoints, softmax, compared='classes and boxes of both sets of points')
    if isinstance(head, RTMDetInsHead):
        return LocationReader(taps, _read_rtmdet_ins, softmax, compared='classes, decoded boxes and masks')
    if isinstance(head, CondInstBboxHead) and isinstance(mask_head, CondInstMaskHead):
        return LocationReader(
            (BOX_HEAD, MASK_FEATURES),
            _with_condinst_masks(mask_head),
            softmax,
            compared='classes, centerness, decoded boxes and masks',
        )
    if isinstance(head, YOLACTHead) and isinstance(mask_head, YOLACTProtonet):
        return LocationReader(
            (BOX_HEAD, PROTOTYPES), _read_yolact, softmax, compared='classes, decoded boxes and masks'
        )
    factor = _factor_name(head)
    classes = f'classes, {factor}' if factor else 'classes'
    if _is_decoded(head):
        comma = ',' if factor else ''
        return LocationReader(taps, _read_contract, softmax, compared=f'{classes}{comma} and decoded boxes')
    return LocationReader(taps, _read_contract, softmax, compared=classes, lost=_unknown_decoding(head))


def decodes_like(head: Any, base: type) -> bool:
    """Return whether ``head`` decodes its maps by the methods of ``base``."""
    return all(
        getattr(type(head), method, None) is getattr(base, method, None)
        for method in ('predict_by_feat', '_predict_by_feat_single', '_bbox_decode')
    )


def _unknown_decoding(head: Any) -> str:
    return f'boxes, undecoded, since {type(head).__name__} decodes them in an unknown way'


def _factor_name(head: Any) -> str:
    """Name the factor of a head's scores, for the log: what it has a loss for, such as the centerness."""
    if isinstance(head, RTMDetHead):
        # It inherits ATSS's loss, but has no such map.
        return ''
    return next((name for name in ('centerness', 'iou') if hasattr(head, f'loss_{name}')), '')


def _is_decoded(head: Any) -> bool:
    """Return whether :func:`_decode_contract` decodes the boxes of ``head``."""
    if any(isinstance(head, base) and decodes_like(head, base) for base in (GFLHead, FoveaHead)):
        return True
    return _decodes_by_coder(head)


def _decodes_by_coder(head: Any) -> bool:
    if not isinstance(head, (AnchorHead, AnchorFreeHead, RTMDetHead)):
        return False
    if not any(head._predict_by_feat_single.__func__ is base._predict_by_feat_single for base in GENERIC_DECODING):
        return False
    if not any(type(head).predict_by_feat is base.predict_by_feat for base in GENERIC_DECODING):
        return False
    coder: Any = getattr(head, 'bbox_coder', None)
    if type(coder) is TBLRBBoxCoder:
        return isinstance(coder.normalizer, float)
    return type(coder) in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)


def _is_sigmoid(head: Any) -> bool:
    return bool(getattr(head.loss_cls, 'use_sigmoid', False))


def _levels(head: Any) -> int | None:
    """Return the number of levels of a head, or None if it does not tell."""
    generator = getattr(head, 'prior_generator', None) or getattr(head, 'square_anchor_generator', None)
    if generator is not None:
        return int(generator.num_levels)
    strides = getattr(head, 'strides', None)
    return None if strides is None else len(strides)


def _priors(generator: Any, levels: Sequence[Tensor], constants: Constants, name: str = 'priors') -> list[Tensor]:
    """Return the priors of each level: anchors (P, 4), or centers and strides (P, 4) of points; pixels."""
    sizes, device = map_sizes(levels), levels[0].device
    points = not hasattr(generator, 'base_anchors')
    options = dict(with_stride=True) if points else {}
    return constants.get(
        (name, tuple(sizes), device),
        lambda: [get_box_tensor(prior) for prior in generator.grid_priors(sizes, device=device, **options)],
    )


def _per_location(values: Sequence[float], priors: Sequence[Tensor], constants: Constants, name: str) -> Tensor:
    """Repeat a value of each level for all its locations, (P, 1)."""
    counts = tuple(len(level) for level in priors)
    device = priors[0].device
    return constants.get(
        (name, counts, device),
        lambda: torch.cat(
            [torch.full((count, 1), float(value), device=device) for count, value in zip(counts, values, strict=True)]
        ),
    )


def _strides(head: Any, priors: Sequence[Tensor], constants: Constants) -> Tensor:
    strides = [stride[0] if isinstance(stride, (tuple, list)) else stride for stride in head.prior_generator.strides]
    return _per_location(strides, priors, constants, 'strides')


def decode_deltas(coder: Any, anchors: Tensor, deltas: Tensor, constants: Constants) -> Tensor:
    """Decode as ``DeltaXYWHBBoxCoder.decode`` does, with its constants on the device.

    Args:
        coder: The head's coder.
        anchors: Boxes xyxy, (P, 4).
        deltas: Shape (N, P, 4).
        constants: Holds the coder's constants.
    """
    device = anchors.device
    scale = constants.get(('coder', device), lambda: DeltaCoder.from_mmdet(coder, device))
    if not coder.add_ctr_clamp:
        return scale.decode(anchors, deltas)
    values = deltas * scale.stds + scale.means
    low, high = anchors[:, :2], anchors[:, 2:]
    side = high - low
    center = 0.5 * (low + high) + (values[..., :2] * side).clamp(-coder.ctr_clamp, coder.ctr_clamp)
    half = 0.5 * side * values[..., 2:].clamp(max=MAX_LOG_RATIO).exp()
    return torch.cat((center - half, center + half), -1)


def _decode_contract(
    head: Any, bbox_preds: Sequence[Tensor], constants: Constants
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Decode the box regression of a head.

    Returns:
        Boxes, empty if the decoding is unknown, and the logits of distributions of distances, if any.
    """
    if not _is_decoded(head):
        return (), None
    priors = _priors(head.prior_generator, bbox_preds, constants)
    joined = torch.cat(priors)
    if isinstance(head, GFLHead):
        bins = head.reg_max + 1
        sides = rows(bbox_preds, 4 * bins).unflatten(-1, (4, bins))
        # A sum instead of a matrix product, which TF32 would round.
        distances = (sides.softmax(-1) * head.integral.project).sum(-1) * _strides(head, priors, constants)
        return (distance2bbox((joined[:, :2] + joined[:, 2:]) / 2, distances),), sides
    values = rows(bbox_preds, 4)
    if isinstance(head, FoveaHead):
        lengths = _per_location(head.base_edge_list, priors, constants, 'lengths')
        return (distance2bbox(joined[:, :2], values.clamp(max=LARGEST_LOG).exp() * lengths),), None
    coder = head.bbox_coder
    if isinstance(coder, DistancePointBBoxCoder):
        in_strides = isinstance(head, CenterNetUpdateHead) or getattr(head, 'norm_on_bbox', False)
        if in_strides and not isinstance(head, AutoAssignHead):
            # Such heads multiply by the stride in eval mode only.
            values = values * _strides(head, priors, constants)
        return (distance2bbox(joined[:, :2], values),), None
    if isinstance(coder, TBLRBBoxCoder):
        return (get_box_tensor(coder.decode(joined.expand(len(values), -1, -1), values)),), None
    return (decode_deltas(coder, joined, values, constants),), None


def _read_contract(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    """Read class scores, box regression and possibly a factor, or other values, of each level."""
    maps = outputs[BOX_HEAD]
    levels = _levels(head)
    assert levels is not None
    kinds = min(len(maps) // levels, _kinds(head))
    groups = split_levels(maps, levels, kinds)
    if kinds < 2:
        raise MapsError('there are no maps of boxes')
    classes = rows(groups[0], head.cls_out_channels)
    cells = sum(height * width for height, width in map_sizes(groups[0]))
    count = classes.shape[1]
    bboxes, sides = _decode_contract(head, groups[1], constants)
    if bboxes and bboxes[0].shape[1] != count:
        raise MapsError('scores and boxes belong to different numbers of locations')
    factor = None
    regressions = [] if bboxes else [groups[1]]
    for group in groups[2:]:
        if factor is None and sum(level.shape[1] * level[0, 0].numel() for level in group) == count:
            factor = rows(group, 1)[..., 0]
        else:
            regressions.append(group)
    return LocationOutputs(
        classes, factor, bboxes, sides, tuple(_by_location(group, count, cells) for group in regressions)
    )


def _kinds(head: Any) -> int:
    """Return the largest number of kinds of maps of a head: those that its ``predict_by_feat`` or loss names."""
    return 4 if isinstance(head, (CondInstBboxHead, RTMDetInsHead)) or _has_guided_anchors(head) else 3


def _has_guided_anchors(head: Any) -> bool:
    return hasattr(head, 'square_anchor_generator') and hasattr(head, 'loc_filter_thr')


def _by_location(levels: Sequence[Tensor], count: int, cells: int) -> Tensor:
    """Join maps with any number of values, (N, P, K), for ``count`` locations in ``cells`` cells."""
    channels = {level.shape[1] for level in levels}
    if count % cells or len(channels) > 1 or next(iter(channels)) % (count // cells):
        raise MapsError('a map does not hold the same number of values for each location')
    return rows(levels, next(iter(channels)) // (count // cells))


def _read_yolov3(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    (maps,) = split_levels(outputs[BOX_HEAD], head.num_levels, 1)
    values = rows(maps, head.num_attrib)
    classes, objectness = values[..., 5:], values[..., 4]
    if not decodes_like(head, YOLOV3Head):
        return LocationOutputs(classes, objectness, regressions=(values[..., :4],))
    priors = _priors(head.prior_generator, maps, constants)
    strides = _per_location(head.featmap_strides, priors, constants, 'strides')
    anchors = torch.cat(priors)
    # As YOLOBBoxCoder.decode. The head applies the sigmoid.
    center = (anchors[:, :2] + anchors[:, 2:]) * 0.5 + (values[..., :2].sigmoid() - 0.5) * strides
    half = (anchors[:, 2:] - anchors[:, :2]) * 0.5 * values[..., 2:4].clamp(max=LARGEST_LOG).exp()
    return LocationOutputs(classes, objectness, (torch.cat((center - half, center + half), -1),))


def _read_yolox(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    class_maps, box_maps, objectness_maps = split_levels(outputs[BOX_HEAD], head.prior_generator.num_levels, 3)
    classes, values = rows(class_maps, head.cls_out_channels), rows(box_maps, 4)
    objectness = rows(objectness_maps, 1)[..., 0]
    if not decodes_like(head, YOLOXHead):
        return LocationOutputs(classes, objectness, regressions=(values,))
    priors = torch.cat(_priors(head.prior_generator, class_maps, constants))
    values = torch.cat((values[..., :2], values[..., 2:].clamp(max=LARGEST_LOG)), -1)
    return LocationOutputs(classes, objectness, (head._bbox_decode(priors, values),))


def _read_centernet(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    heat, size, offset = split_levels(outputs[BOX_HEAD], 1, 3)
    (map_size,), device = map_sizes(heat), heat[0].device
    height, width = map_size

    def grid() -> Tensor:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        return torch.stack((x, y), -1).view(-1, 2).float().to(device)

    # In cells, which is enough: an IoU has no unit.
    center = constants.get(('cells', map_size, device), grid) + rows(offset, 2)
    half = 0.5 * rows(size, 2).clamp(min=0)
    bboxes = torch.cat((center - half, center + half), -1)
    return LocationOutputs(_logits(rows(heat, heat[0].shape[1])), bboxes=(bboxes,))


def _logits(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities, eps=PROBABILITY_EPS)


def _read_corners(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    """Read the maps of top-left and bottom-right corners, which alternate, as twice as many locations."""
    maps, levels = outputs[BOX_HEAD], head.num_feat_levels
    kinds = split_levels(maps, levels, len(maps) // levels)
    if len(kinds) % 2:
        raise MapsError('the maps of corners are not paired')
    both = [
        torch.cat((rows(first, first[0].shape[1]), rows(second, second[0].shape[1])), 1)
        for first, second in zip(kinds[::2], kinds[1::2], strict=True)
    ]
    return LocationOutputs(both[0], regressions=tuple(both[1:]))


def _read_sabl(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    maps = outputs[BOX_HEAD]
    levels = head.square_anchor_generator.num_levels
    class_maps = list(maps[:levels])
    # Maps of buckets and of offsets in the buckets alternate.
    pairs = maps[levels : 3 * levels]
    values = tuple(rows(kind, 4 * head.side_num) for kind in (pairs[::2], pairs[1::2]))
    classes = rows(class_maps, head.cls_out_channels)
    if any(value.shape[1] != classes.shape[1] for value in values):
        raise MapsError('scores and boxes belong to different numbers of locations')
    return LocationOutputs(classes, regressions=values)


def _read_tood(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    class_maps, box_maps = split_levels(outputs[BOX_HEAD], head.prior_generator.num_levels, 2)
    priors = _priors(head.prior_generator, class_maps, constants)
    bboxes = rows(box_maps, 4) * _strides(head, priors, constants)
    return LocationOutputs(_logits(rows(class_maps, head.cls_out_channels)), bboxes=(bboxes,))


def _read_vfnet(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    class_maps, *box_maps = split_levels(outputs[BOX_HEAD], head.prior_generator.num_levels, 3)
    points = torch.cat(_priors(head.prior_generator, class_maps, constants))[:, :2]
    bboxes = tuple(distance2bbox(points, rows(kind, 4)) for kind in box_maps)
    return LocationOutputs(rows(class_maps, head.cls_out_channels), bboxes=bboxes)


def _read_reppoints(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    class_maps, *point_maps = split_levels(outputs[BOX_HEAD], head.prior_generator.num_levels, 3)
    priors = _priors(head.prior_generator, class_maps, constants)
    centers = torch.cat(priors)[:, :2].repeat(1, 2)
    strides = _per_location(head.point_strides, priors, constants, 'strides')
    bboxes = tuple(
        rows([head.points2bbox(level.float()) for level in kind], 4) * strides + centers for kind in point_maps
    )
    return LocationOutputs(rows(class_maps, head.cls_out_channels), bboxes=bboxes)


def _offsets_to(
    generator: Any, features: Tensor, priors: Tensor, unit: float, constants: Constants, name: str
) -> Callable[[Tensor], Tensor]:
    """Return the function that :func:`~mmzsq.distillation.location_outputs.dynamic_masks` calls ``offsets``.

    Args:
        generator: Generates the positions of the pixels of ``features`` on its first level.
        features: Features of the masks, (N, D, h, w).
        priors: Center and stride of each location, (P, 4).
        unit: Unit of the offsets, in strides of the location.
        constants: Holds the positions.
        name: Name of the positions among the constants.
    """
    height, width = features.shape[2:]
    device = features.device
    pixels = constants.get(
        (name, height, width, device),
        lambda: generator.single_level_grid_priors((height, width), level_idx=0, device=device),
    )

    def offsets(indices: Tensor) -> Tensor:
        chosen = priors[indices]
        difference = (chosen[..., None, :2] - pixels) / (chosen[..., None, 2:] * unit)
        return difference.transpose(2, 3).unflatten(3, (height, width))

    return offsets


def _read_rtmdet_ins(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    maps, levels = outputs[BOX_HEAD], head.prior_generator.num_levels
    class_maps, box_maps, kernel_maps = split_levels(maps, levels, 3)
    if len(maps) <= 3 * levels:
        raise MapsError('there are no mask features')
    features = maps[3 * levels].float()
    priors = torch.cat(_priors(head.prior_generator, class_maps, constants))
    kernels = rows(kernel_maps, kernel_maps[0].shape[1])
    offsets = _offsets_to(head.prior_generator, features, priors, 8.0, constants, 'mask pixels')
    return LocationOutputs(
        rows(class_maps, head.cls_out_channels),
        bboxes=(distance2bbox(priors[:, :2], rows(box_maps, 4)),),
        masks=(dynamic_masks(kernels, features, offsets, head.parse_dynamic_params),),
    )


def _with_condinst_masks(mask_head: Any) -> Read:
    def read(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
        read_boxes = _read_contract(head, outputs, constants)
        (kernels,) = read_boxes.regressions
        features = outputs[MASK_FEATURES][0].float()
        levels = split_levels(outputs[BOX_HEAD], head.prior_generator.num_levels, 1)[0]
        priors = torch.cat(_priors(head.prior_generator, levels, constants))
        unit = float(mask_head.size_of_interest)
        offsets = _offsets_to(mask_head.prior_generator, features, priors, unit, constants, 'mask pixels')
        masks = (dynamic_masks(kernels, features, offsets, mask_head.parse_dynamic_params),)
        return read_boxes._replace(regressions=(), masks=masks)

    return read


def _read_yolact(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    read_boxes = _read_contract(head, outputs, constants)
    (coefficients,) = read_boxes.regressions
    return read_boxes._replace(regressions=(), masks=(linear_masks(coefficients, outputs[PROTOTYPES][0].float()),))


def _read_solo(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    maps, levels = outputs[MASK_HEAD], head.num_levels
    if len(maps) < 2 * levels:
        raise MapsError(f'{len(maps)} maps were returned, but masks and classes on {levels} levels are expected')
    masks, class_maps = maps[:levels], maps[levels : 2 * levels]
    if any(mask.shape[1] != scores[0, 0].numel() for mask, scores in zip(masks, class_maps, strict=True)):
        raise MapsError('masks and classes belong to different numbers of cells')
    return LocationOutputs(rows(class_maps, head.cls_out_channels), masks=direct_masks(masks))


def _read_decoupled_solo(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    maps, levels = outputs[MASK_HEAD], head.num_levels
    if len(maps) < 3 * levels:
        raise MapsError(f'{len(maps)} maps were returned, but three kinds on {levels} levels are expected')
    classes = rows(maps[2 * levels : 3 * levels], head.cls_out_channels)
    return LocationOutputs(classes, maps=tuple(maps[: 2 * levels]))


def _read_solov2(head: Any, outputs: Outputs, constants: Constants) -> LocationOutputs:
    maps, levels = outputs[MASK_HEAD], head.num_levels
    kernel_maps, class_maps = split_levels(maps, levels, 2)
    if len(maps) <= 2 * levels:
        raise MapsError('there are no mask features')
    classes, features = rows(class_maps, head.cls_out_channels), maps[2 * levels].float()
    kernels = rows(kernel_maps, kernel_maps[0].shape[1])
    if head.dynamic_conv_size == 1:
        return LocationOutputs(classes, masks=(linear_masks(kernels, features),))
    return LocationOutputs(classes, coefficients=(kernels,), maps=(features,))


def head_of(detector: nn.Module, reader: LocationReader) -> Any:
    """Return the head that ``reader`` reads."""
    return getattr(detector, reader.taps[0])
