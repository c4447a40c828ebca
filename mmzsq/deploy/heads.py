# SPDX-License-Identifier: Apache-2.0
"""Parts of a detector that become one graph each, and decoding of dense predictions in traceable form.

A dense detector is one graph, which ends at decoded boxes and class scores or at the head's raw maps. A two-stage
detector is a graph of backbone, neck and RPN, one of each box head, and one of the mask head: RoIAlign and NMS between
them stay in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead, GFLHead, RTMDetHead, YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.anchor_free_head import AnchorFreeHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn

from mmzsq.deploy.markers import marking
from mmzsq.errors import UserError
from mmzsq.patching import patched
from mmzsq.quantization import quantized_layers

DETECTOR, FEATURES, BOX_HEAD, MASK_HEAD = 'detector', 'features', 'box_head', 'mask_head'
Decoder = Callable[[Any, Any], tuple[Tensor, ...]]


@dataclass
class Part:
    """One graph of a detector.

    Attributes:
        name: ``'detector'`` for a dense one; ``'features'``, ``'box_head'`` and ``'mask_head'`` for a two-stage one.
        module: Maps one tensor to a flat tuple of tensors.
        example: Input to trace with.
        input_name: Name of the input.
        output_names: Names of the outputs.
        structure: Nesting of the outputs in the detector's own code, as lists of indices into the outputs.
        locations: Number of locations of each level of a decoded graph, else empty.
    """

    name: str
    module: nn.Module
    example: Tensor
    input_name: str
    output_names: list[str]
    structure: Any
    locations: list[int]


def parts_of(detector: Any, size: tuple[int, int], raw: bool) -> list[Part]:
    """Split a detector into parts.

    Args:
        detector: A detector of MMDetection.
        size: Height and width of the images, in pixels.
        raw: Whether a dense detector ends at the raw maps of its head.

    Returns:
        One part for a dense detector. For a two-stage detector: features, box heads, mask heads.

    Raises:
        UserError: If the detector, or a module of it, cannot be exported, or does not take images of ``size``.
    """
    _check_operators(detector)
    _check_size(detector, size)
    images = torch.zeros(1, 3, *size, device=next(detector.parameters()).device)
    if isinstance(detector, TwoStageDetector):
        return _two_stage_parts(detector, images)
    if not isinstance(detector, SingleStageDetector) or getattr(detector, 'mask_head', None) is not None:
        kind = type(detector).__name__
        name = next(
            (name for name in ('encoder', 'decoder', 'mask_head', 'panoptic_head') if _has(detector, name)), None
        )
        part = '' if name is None else f'{name} ({type(getattr(detector, name)).__name__}) cannot be exported: '
        raise UserError(f'{part}{kind} is neither a dense nor a two-stage detector, the kinds that can be exported.')
    decode = None if raw else decoder_of(detector.bbox_head)
    maps = _run(lambda: detector.bbox_head(detector.extract_feat(images)), detector, size)
    flat: list[Tensor] = []
    structure = flatten(maps, flat)
    if decode is None:
        names = _names('map', structure)
        return [Part(DETECTOR, _RawMaps(detector), images, 'images', names, structure, [])]
    locations = _locations(detector.bbox_head, maps)
    module = _Decoded(detector, decode)
    names = ['boxes', 'scores', 'factors'][: len(_run(lambda: module(images), detector, size))]
    return [Part(DETECTOR, module, images, 'images', names, list(range(len(names))), locations)]


def _has(detector: Any, name: str) -> bool:
    return getattr(detector, name, None) is not None


def box_heads(roi_head: Any) -> list[Any]:
    """Return the box heads of a two-stage detector, one for each stage of a cascade."""
    return list(roi_head.bbox_head) if isinstance(roi_head.bbox_head, nn.ModuleList) else [roi_head.bbox_head]


def mask_heads(roi_head: Any) -> list[Any]:
    """Return the mask heads of a two-stage detector, one for each stage of a cascade, or an empty list."""
    if not roi_head.with_mask:
        return []
    return list(roi_head.mask_head) if isinstance(roi_head.mask_head, nn.ModuleList) else [roi_head.mask_head]


def part_names(kind: str, count: int) -> list[str]:
    """Name the parts of one kind: ``box_head``, or ``box_head0``, ``box_head1``, ... in a cascade."""
    return [kind] if count == 1 else [f'{kind}{index}' for index in range(count)]


def flatten(nested: Any, flat: list[Tensor]) -> Any:
    """Collect the tensors of nested sequences.

    Args:
        nested: Tensors in lists and tuples. None stays None.
        flat: List to which the tensors are appended.

    Returns:
        The same nesting, in lists, with the index of each tensor in its place.

    Raises:
        UserError: If there is another value, such as a dict.
    """
    if nested is None:
        return None
    if isinstance(nested, Tensor):
        flat.append(nested)
        return len(flat) - 1
    if not isinstance(nested, (tuple, list)):
        raise UserError(
            f'The detector cannot be exported: its head returns a value of type {type(nested).__name__}. Let the '
            'forward of the head return tensors in lists or tuples.'
        )
    return [flatten(item, flat) for item in nested]


def unflatten(structure: Any, flat: Sequence[Tensor]) -> Any:
    """Invert :func:`flatten`. The outermost sequence becomes a tuple, inner ones become lists.

    Args:
        structure: Result of :func:`flatten`.
        flat: Tensors by index.
    """
    if structure is None:
        return None
    if isinstance(structure, int):
        return flat[structure]
    return tuple(_unflatten_list(item, flat) for item in structure)


def _unflatten_list(structure: Any, flat: Sequence[Tensor]) -> Any:
    if isinstance(structure, list):
        return [_unflatten_list(item, flat) for item in structure]
    return None if structure is None else flat[structure]


def decoder_of(head: Any) -> Decoder:
    """Return the function that decodes the maps of a dense head.

    Args:
        head: The ``bbox_head`` of a dense detector.

    Returns:
        Maps the head and its outputs to boxes (N, P, 4), xyxy in pixels of the network's input and not clipped, and
        class scores (N, P, C) in [0, 1]. Heads that compare scores with a threshold before they multiply them by
        centerness or objectness return this factor too, (N, P) in [0, 1]; the scores are the products.

    Raises:
        UserError: If the head decodes in an unknown way.
    """
    if hasattr(head, 'dense_predictions') and hasattr(head, 'post_processor'):
        return _decode_selected
    if isinstance(head, YOLOXHead):
        return _decode_yolox
    if isinstance(head, YOLOV3Head):
        return _decode_yolov3
    single = getattr(type(head), '_predict_by_feat_single', None)
    own = type(head).__dict__.get('predict_by_feat')
    if own is None and isinstance(head, GFLHead) and single is GFLHead._predict_by_feat_single:
        return _decode_priors
    plain = isinstance(head, (AnchorHead, AnchorFreeHead, RTMDetHead))
    generic = getattr(type(head), 'predict_by_feat', None) is BaseDenseHead.predict_by_feat
    if plain and generic and single is BaseDenseHead._predict_by_feat_single:
        return _decode_priors
    raise UserError(
        f'bbox_head ({type(head).__name__}) decodes its predictions in a way that is not exported: '
        'use --raw, which ends the graph at the maps of the head.'
    )


def _decode_selected(head: Any, maps: Any) -> tuple[Tensor, Tensor]:
    """Decode with the head's own ``predict_by_feat``, up to the selection of detections."""
    captured: list[tuple[Tensor, Tensor]] = []

    class Selection:
        @staticmethod
        def process_batch(bboxes: Tensor, objectness: Tensor, classes: Tensor, *_: Any) -> list[Any]:
            captured.append((bboxes, objectness[..., None] * classes))
            return []

    with patched(head, 'post_processor', Selection()):
        head.predict_by_feat(*maps, batch_img_metas=[])
    return captured[0]


def _decode_yolox(head: Any, maps: Any) -> tuple[Tensor, Tensor]:
    cls_scores, bbox_preds, objectness = maps
    sizes = [tuple(scores.shape[-2:]) for scores in cls_scores]
    priors = head.prior_generator.grid_priors(sizes, device=cls_scores[0].device, with_stride=True)
    scores = _rows(cls_scores, head.cls_out_channels).sigmoid() * _rows(objectness, 1).sigmoid()
    return head._bbox_decode(torch.cat(priors), _rows(bbox_preds, 4)), scores


def _decode_yolov3(head: Any, maps: Any) -> tuple[Tensor, Tensor, Tensor]:
    (maps,) = maps
    sizes = [tuple(level.shape[-2:]) for level in maps]
    anchors = torch.cat(head.prior_generator.grid_priors(sizes, device=maps[0].device))
    rows = _rows(maps, head.num_attrib)
    per_level = [rows_of * columns * head.num_base_priors for rows_of, columns in sizes]
    strides = torch.cat(
        [
            anchors.new_full((count, 1), float(stride))
            for count, stride in zip(per_level, head.featmap_strides, strict=True)
        ]
    )
    # As YOLOBBoxCoder.decode, whose in-place arithmetic is not traced.
    centers = (anchors[:, :2] + anchors[:, 2:]) * 0.5
    half_sizes = (anchors[:, 2:] - anchors[:, :2]) * 0.5
    centers = centers + (rows[..., :2].sigmoid() - 0.5) * strides
    half_sizes = half_sizes * rows[..., 2:4].exp()
    boxes = torch.cat((centers - half_sizes, centers + half_sizes), dim=-1)
    objectness = rows[..., 4].sigmoid()
    return boxes, rows[..., 5:].sigmoid() * objectness[..., None], objectness


def _decode_priors(head: Any, maps: Any) -> tuple[Tensor, ...]:
    """Decode with the head's prior generator and box coder, as ``BaseDenseHead.predict_by_feat`` does."""
    cls_scores, bbox_preds, factors = (*maps, None)[:3]
    sizes = [tuple(level.shape[-2:]) for level in cls_scores]
    mlvl_priors = head.prior_generator.grid_priors(sizes, dtype=cls_scores[0].dtype, device=cls_scores[0].device)
    scores = _rows(cls_scores, head.cls_out_channels)
    scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
    extra: tuple[Tensor, ...] = ()
    if factors is not None:
        factor = _rows(factors, 1).sigmoid()
        scores, extra = scores * factor, (factor[..., 0],)
    priors = torch.cat(mlvl_priors)
    if isinstance(head, GFLHead):
        levels = [
            head.integral(level.permute(0, 2, 3, 1)).reshape(level.shape[0], -1, 4) * stride[0]
            for level, stride in zip(bbox_preds, head.prior_generator.strides, strict=True)
        ]
        deltas, priors = torch.cat(levels, dim=1), head.anchor_center(priors)
    else:
        deltas = _rows(bbox_preds, head.bbox_coder.encode_size)
    # Coders are traceable only for two dimensions, (P, 4).
    repeated = priors.expand(deltas.shape[0], *priors.shape).reshape(-1, priors.shape[-1])
    boxes = head.bbox_coder.decode(repeated, deltas.reshape(-1, deltas.shape[-1]))
    return boxes.reshape(deltas.shape[0], -1, 4), scores, *extra


def _rows(levels: Sequence[Tensor], channels: int) -> Tensor:
    """Maps (N, A * channels, H, W) of all levels as (N, P, channels)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, channels) for level in levels], dim=1)


class _RawMaps(nn.Module):
    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        flat: list[Tensor] = []
        flatten(self.detector.bbox_head(self.detector.extract_feat(images)), flat)
        return tuple(flat)


class _Decoded(nn.Module):
    def __init__(self, detector: Any, decode: Decoder) -> None:
        super().__init__()
        self.detector = detector
        self.decode = decode

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head = self.detector.bbox_head
        return self.decode(head, head(self.detector.extract_feat(images)))


class _Features(nn.Module):
    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.detector.extract_feat(images)
        flat: list[Tensor] = []
        flatten((features, self.detector.rpn_head(features)), flat)
        return tuple(flat)


class _Head(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, regions: Tensor) -> tuple[Tensor, ...]:
        flat: list[Tensor] = []
        flatten(self.head(regions), flat)
        return tuple(flat)


def _two_stage_parts(detector: Any, images: Tensor) -> list[Part]:
    roi_head = detector.roi_head
    if type(roi_head) not in (StandardRoIHead, CascadeRoIHead) or roi_head.with_shared_head:
        raise UserError(
            f'roi_head ({type(roi_head).__name__}) cannot be exported: StandardRoIHead and CascadeRoIHead can, '
            'without a shared head.'
        )
    _check_extractors(roi_head)
    size = (images.shape[2], images.shape[3])
    features = _Features(detector)
    nested = _without_values(detector, images)
    if nested is None:
        nested = _run(lambda: _nested_features(detector, images), detector, size)
    structure = flatten(nested, [])
    names = [*_names('feature', structure[0]), *_names('rpn', structure[1])]
    parts = [Part(FEATURES, features, images, 'images', names, structure, [])]
    for kind, heads, extractors in (
        (BOX_HEAD, box_heads(roi_head), roi_head.bbox_roi_extractor),
        (MASK_HEAD, mask_heads(roi_head), roi_head.mask_roi_extractor if roi_head.with_mask else None),
    ):
        for index, (name, head) in enumerate(zip(part_names(kind, len(heads)), heads, strict=True)):
            extractor: Any = extractors[index] if isinstance(extractors, nn.ModuleList) else extractors
            resolution = extractor.roi_layers[0].output_size
            regions = images.new_zeros(2, extractor.out_channels, *resolution)
            flat: list[Tensor] = []
            with torch.no_grad():
                nesting = flatten(head(regions), flat)
            outputs = [f'{name}_output{number}' for number in range(len(flat))]
            parts.append(Part(name, _Head(head), regions, 'regions', outputs, nesting, []))
    return parts


def _check_extractors(roi_head: Any) -> None:
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        extractor = getattr(roi_head, name, None)
        if extractor is not None and any(True for _ in quantized_layers(extractor)):
            raise UserError(
                f'roi_head.{name} ({type(extractor).__name__}) cannot be exported: RoIAlign runs between the files, '
                'and this one has layers.'
            )


class _NestedFeatures(nn.Module):
    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Any:
        return _nested_features(self.detector, images)


def _nested_features(detector: Any, images: Tensor) -> Any:
    features = detector.extract_feat(images)
    return features, detector.rpn_head(features)


def _without_values(detector: Any, images: Tensor) -> Any | None:
    """Features and maps of the RPN with shapes but without values, which takes neither time nor memory.

    Returns:
        Tensors on the device ``'meta'``. None if the detector needs values, or does not take the images.
    """
    module = _NestedFeatures(detector)
    state = {name: value.to('meta') for name, value in (*module.named_parameters(), *module.named_buffers())}
    training = [child for child in detector.modules() if child.training]
    detector.eval()
    try:
        with torch.no_grad(), marking(detector):
            # Quantizers belong to several layers. PyTorch would swap a tied module twice, and not restore it.
            return torch.func.functional_call(module, state, (images.to('meta'),), tie_weights=False)
    except Exception:
        # Whatever code of a detector raises on this device; a run with values then says what is wrong.
        return None
    finally:
        for child in training:
            child.training = True


def _names(prefix: str, structure: Any) -> list[str]:
    """Name outputs by their place: ``map1_2`` is the third level of the second kind of map."""
    if isinstance(structure, int):
        return [prefix]
    names: list[str] = []
    for index, item in enumerate(structure or ()):
        nested = isinstance(item, list)
        names += (
            _names(f'{prefix}{index}' if not prefix[-1].isdigit() else f'{prefix}_{index}', item)
            if (nested or item is not None)
            else []
        )
    return names


def _locations(head: Any, maps: Any) -> list[int]:
    """Number of locations of each level, in the order of the decoded boxes."""
    levels = maps[0]
    channels = getattr(head, 'cls_out_channels', None)
    if isinstance(head, YOLOV3Head):
        return [level.shape[2] * level.shape[3] * head.num_base_priors for level in levels]
    if channels is None:
        return []
    return [level.shape[1] // channels * level.shape[2] * level.shape[3] for level in levels]


def _run(call: Callable[[], Any], detector: Any, size: tuple[int, int]) -> Any:
    """Call a function in eval mode and without gradients.

    Raises:
        UserError: If the call fails, as it does if the neck does not support the image size.
    """
    training = [module for module in detector.modules() if module.training]
    detector.eval()
    try:
        with torch.no_grad():
            return call()
    except (RuntimeError, ValueError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'{type(detector).__name__} cannot run on images of {size[0]}x{size[1]} pixels (height x width): {first}'
        ) from error
    finally:
        for module in training:
            module.training = True


def _check_size(detector: Any, size: tuple[int, int]) -> None:
    divisor = getattr(detector.data_preprocessor, 'pad_size_divisor', 1)
    if min(size) < 1 or any(side % divisor for side in size):
        raise UserError(
            f'size is {size[0]} {size[1]} (height, width), but both must be positive multiples of {divisor}, the '
            "data preprocessor's pad_size_divisor."
        )


def _check_operators(detector: nn.Module) -> None:
    for name, module in detector.named_modules():
        if 'Deform' in type(module).__name__ and isinstance(getattr(module, 'weight', None), Tensor):
            raise UserError(
                f'{name} ({type(module).__name__}) cannot be exported: the runtimes have no operator for a '
                'deformable convolution with quantized inputs.'
            )
