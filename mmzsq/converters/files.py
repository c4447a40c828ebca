# SPDX-License-Identifier: Apache-2.0
"""Recognize a checkpoint of another project and convert it, with the config that its weights belong to.

:data:`CONVERTERS` is the registry: a new source of weights adds one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from torch import Tensor

from mmzsq.checkpoint import load_from_local
from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.detectors import convert_detector
from mmzsq.converters.torchvision import convert_torchvision, is_torchvision
from mmzsq.converters.ultralytics import read_ultralytics
from mmzsq.errors import UserError

SUPPORTED = (
    "a .pt file of Ultralytics' YOLOv5, YOLOv8, YOLO11 or YOLO26, or a state dict of torchvision's "
    'fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn or retinanet_resnet50_fpn'
)
"""Supported files, for messages."""

COCO = tuple(CocoDataset.METAINFO['classes'])


@dataclass(frozen=True)
class ForeignDetector:
    """A converted detector.

    Attributes:
        converted: Its weights under the names of this package or of MMDetection.
        classes: Class names in the order of the labels.
        config: Base config of the detector, such as ``mmzsq::yolov5/yolov5-n_coco.py``.
        settings: Base config with settings of the family and the name of its section, None if the presets suit.
        heads: Keys of the model's config that hold ``num_classes``.
    """

    converted: ConvertedDetector
    classes: tuple[str, ...]
    config: str
    settings: tuple[str, str] | None
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Converter:
    """A source of weights.

    Attributes:
        read: Reads tensors and class names, empty if the file has none.
        matches: Whether the tensors are of this source.
        convert: Converts the tensors; its second argument is the number of class names that the user gave, or None.
        config: Base config of a converted detector.
        settings: Settings by family, as in :class:`ForeignDetector`.
        heads: Heads with ``num_classes`` by family; ``bbox_head`` otherwise.
    """

    read: Callable[[Path], tuple[Mapping[str, Tensor], Sequence[str]]]
    matches: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Tensor], int | None], ConvertedDetector]
    config: Callable[[ConvertedDetector], str]
    settings: Mapping[str, tuple[str, str]]
    heads: Mapping[str, tuple[str, ...]]


def _read_ultralytics(path: Path) -> tuple[Mapping[str, Tensor], Sequence[str]]:
    checkpoint = read_ultralytics(path)
    return checkpoint.tensors, checkpoint.classes


def _convert_ultralytics(tensors: Mapping[str, Tensor], _num_names: int | None) -> ConvertedDetector:
    return convert_detector(tensors)


def _ultralytics_config(converted: ConvertedDetector) -> str:
    family = converted.family.lower()
    return f'mmzsq::{family}/{family}-{converted.size}_coco.py'


def _read_state_dict(path: Path) -> tuple[Mapping[str, Tensor], Sequence[str]]:
    """Read a state dict, or the one in a checkpoint of torchvision's training script."""
    loaded: Any = load_from_local(str(path))
    for key in ('model', 'state_dict'):
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    return {name.removeprefix('module.'): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}, ()


TORCHVISION_CONFIGS = {
    'Faster R-CNN': 'faster-rcnn_r50_fpn_coco',
    'Mask R-CNN': 'mask-rcnn_r50_fpn_coco',
    'RetinaNet': 'retinanet_r50_fpn_coco',
}
"""Configs in ``configs/torchvision`` by family."""

CONVERTERS = (
    Converter(
        _read_ultralytics,
        lambda tensors: any(name.startswith('model.0.') for name in tensors),
        _convert_ultralytics,
        _ultralytics_config,
        settings={'YOLO11': ('mmzsq::_base_/yolo11.py', 'yolo11')},
        heads={},
    ),
    Converter(
        _read_state_dict,
        is_torchvision,
        convert_torchvision,
        lambda converted: f'mmzsq::torchvision/{TORCHVISION_CONFIGS[converted.family]}.py',
        settings={
            'Faster R-CNN': ('mmzsq::_base_/two_stage_r50.py', 'two_stage'),
            'Mask R-CNN': ('mmzsq::_base_/two_stage_r50.py', 'two_stage'),
            'RetinaNet': ('mmzsq::_base_/one_stage_800.py', 'one_stage'),
        },
        heads={
            'Faster R-CNN': ('roi_head.bbox_head',),
            'Mask R-CNN': ('roi_head.bbox_head', 'roi_head.mask_head'),
        },
    ),
)
"""Sources of weights in the order in which they are tried."""


def convert_file(path: Path, names: Sequence[str] | None = None) -> ForeignDetector:
    """Convert a file of another project.

    Args:
        path: The file.
        names: Class names, None: those of the file, or COCO's if it has as many classes.

    Raises:
        UserError: If the file is missing, or of no supported detector, or the number of names is wrong. The message
            names the file and what is supported.
    """
    if not path.is_file():
        raise UserError(f'{path} does not exist. Give {SUPPORTED}.')
    reasons = []
    for converter in CONVERTERS:
        try:
            tensors, in_file = converter.read(path)
        except UserError as error:
            reasons.append(str(error).rstrip('.'))
            continue
        if not converter.matches(tensors):
            continue
        try:
            converted = converter.convert(tensors, None if names is None else len(names))
        except UserError as error:
            raise UserError(f'{path} cannot be converted: {str(error).rstrip(".")}. Give {SUPPORTED}.') from error
        return ForeignDetector(
            converted,
            _choose_names(path, converted.num_classes, names, in_file),
            converter.config(converted),
            converter.settings.get(converted.family),
            converter.heads.get(converted.family, ('bbox_head',)),
        )
    detail = f' ({"; ".join(reasons)})' if len(reasons) == len(CONVERTERS) else ''
    raise UserError(f'{path} is not a supported detector{detail}. Give {SUPPORTED}.')


def _choose_names(path: Path, count: int, names: Sequence[str] | None, in_file: Sequence[str]) -> tuple[str, ...]:
    """Choose the class names: those of the user, of the file, or of COCO."""
    chosen = tuple(names if names is not None else in_file)
    if not chosen:
        chosen = COCO if count == len(COCO) else tuple(f'class_{index}' for index in range(count))
    if len(chosen) != count:
        source = '--classes gives' if names is not None else 'it names'
        raise UserError(f'{path} has {count} classes, but {source} {len(chosen)} names: give one name a line')
    return chosen
