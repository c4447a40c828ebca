# SPDX-License-Identifier: Apache-2.0
"""Recognize a checkpoint of another project and convert it, with the config that its weights belong to.

:data:`CONVERTERS` is the registry: a new source of weights adds one entry.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from torch import Tensor

from mmzsq.checkpoint import load_from_local
from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.detectors import convert_detector
from mmzsq.converters.torchvision import convert_torchvision
from mmzsq.converters.ultralytics import ForeignModel, is_model, model_of, read_archive
from mmzsq.errors import UserError

SUPPORTED = (
    "a .pt file of Ultralytics' YOLOv5, YOLOv8, YOLO11 or YOLO26 for detection, or the weights of torchvision's "
    'fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn or retinanet_resnet50_fpn'
)
"""Supported files, for messages."""

WEIGHT_KEYS = ('ema', 'model_ema', 'model', 'model_state_dict', 'state_dict')
"""Keys of checkpoints that hold a model or its state dict, in the order in which they are tried."""

EXPORTED_SUFFIXES = ('.onnx', '.torchscript', '.engine', '.tflite', '.xml', '.bin', '.mlmodel', '.pb')
"""Suffixes of exported models."""

PICKLE_STARTS = (b'\x80', b'(', b'}')
"""First bytes of pickles, as torch < 1.6 wrote them."""

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
        letterbox: Whether all images have one size. If not, they keep their aspect ratio.
    """

    converted: ConvertedDetector
    classes: tuple[str, ...]
    config: str
    settings: tuple[str, str] | None
    heads: tuple[str, ...]
    letterbox: bool


@dataclass(frozen=True)
class Converter:
    """A source of weights.

    Attributes:
        names: Pattern of names of its tensors, without the prefix of a wrapper.
        convert: Converts a model. The other arguments are the number of class names and the epsilon of batch norms that
            the user gave, or None.
        config: Base config of a converted detector.
        settings: Settings by family, as in :class:`ForeignDetector`.
        heads: Heads with ``num_classes`` by family; ``bbox_head`` otherwise.
        letterbox: As in :class:`ForeignDetector`.
    """

    names: str
    convert: Callable[[ForeignModel, int | None, float | None], ConvertedDetector]
    config: Callable[[ConvertedDetector], str]
    settings: Mapping[str, tuple[str, str]]
    heads: Mapping[str, tuple[str, ...]]
    letterbox: bool


def _convert_ultralytics(model: ForeignModel, _num_names: int | None, eps: float | None) -> ConvertedDetector:
    if eps is not None:
        raise UserError('--batch-norm-eps is for weights of torchvision')
    try:
        return convert_detector(model.tensors)
    except UserError as error:
        built = f' It was built from {model.source} ({model.kind})' if model.source else ''
        raise UserError(f'{str(error).rstrip(".")}.{built}' if built else str(error)) from error


def _ultralytics_config(converted: ConvertedDetector) -> str:
    family = converted.family.lower()
    return f'mmzsq::{family}/{family}-{converted.size}_coco.py'


def _convert_torchvision(model: ForeignModel, num_names: int | None, eps: float | None) -> ConvertedDetector:
    if eps is None and len(model.epsilons) == 1:
        (eps,) = model.epsilons
    return convert_torchvision(model.tensors, num_names, eps)


TORCHVISION_CONFIGS = {
    'Faster R-CNN': 'faster-rcnn_r50_fpn_coco',
    'Mask R-CNN': 'mask-rcnn_r50_fpn_coco',
    'RetinaNet': 'retinanet_r50_fpn_coco',
}
"""Configs in ``configs/torchvision`` by family."""

CONVERTERS = (
    Converter(
        r'model\.0\..+',
        _convert_ultralytics,
        _ultralytics_config,
        settings={'YOLO11': ('mmzsq::_base_/yolo11.py', 'yolo11')},
        heads={},
        letterbox=True,
    ),
    Converter(
        r'backbone\.(body|features)\..+',
        _convert_torchvision,
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
        letterbox=False,
    ),
)
"""Sources of weights in the order in which they are tried."""


def convert_file(path: Path, names: Sequence[str] | None = None, eps: float | None = None) -> ForeignDetector:
    """Convert a file of another project.

    Args:
        path: The file.
        names: Class names, None: those of the file, or COCO's if it has as many classes.
        eps: Epsilon of the batch norms of a detector of torchvision, None: derived from the file.

    Raises:
        UserError: If the file is missing, or of no supported detector, or the number of names is wrong. The message
            names the file and what is supported.
    """
    model = _read(path)
    for converter in CONVERTERS:
        tensors = _without_prefix(model.tensors, converter.names)
        if not tensors:
            continue
        try:
            converted = converter.convert(replace(model, tensors=tensors), None if names is None else len(names), eps)
        except UserError as error:
            raise UserError(f'{path} cannot be converted: {str(error).rstrip(".")}. Give {SUPPORTED}.') from error
        return ForeignDetector(
            converted,
            _choose_names(path, converted.num_classes, names, model.classes),
            converter.config(converted),
            converter.settings.get(converted.family),
            converter.heads.get(converted.family, ('bbox_head',)),
            converter.letterbox,
        )
    raise UserError(f'{path} is not a supported detector: its tensors have other names. Give {SUPPORTED}.')


def _read(path: Path) -> ForeignModel:
    """Read a file of any project, without running code from it.

    Raises:
        UserError: If the file is missing or damaged, or holds no weights by name.
    """
    if path.is_dir():
        raise UserError(f'{path} is a folder. Give {SUPPORTED}.')
    if not path.is_file():
        raise UserError(f'{path} does not exist. Give {SUPPORTED}.')
    archive = zipfile.is_zipfile(path)
    if path.suffix in EXPORTED_SUFFIXES or (archive and _is_torchscript(path)):
        raise UserError(f'{path} is an exported model. Give the file that it was exported from: {SUPPORTED}.')
    if not archive and path.suffix != '.safetensors' and path.read_bytes()[:1] not in PICKLE_STARTS:
        raise UserError(f'{path} is no checkpoint: it is empty, cut off, or of another format. Give {SUPPORTED}.')
    try:
        content = read_archive(path) if archive else load_from_local(str(path))
        return _model_in(content, path)
    except UserError as error:
        raise UserError(f'{path} cannot be read: {str(error).rstrip(".")}. Give {SUPPORTED}.') from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith('/constants.pkl') for name in archive.namelist())


def _model_in(content: Any, path: Path) -> ForeignModel:
    """Find the weights in a checkpoint: a module, or a state dict, with an average preferred."""
    if is_model(content):
        return model_of(content, path)
    if not isinstance(content, Mapping):
        raise UserError(f'it contains a {type(content).__name__}, but neither a model nor a dict of weights')
    for key in WEIGHT_KEYS:
        value = content.get(key)
        if is_model(value):
            return model_of(value, path)
        if isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values()):
            content = value
            break
    tensors = {name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError('it contains no weights by name')
    return ForeignModel(tensors)


def _without_prefix(tensors: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Select the tensors of the first module with such names, without the prefix of wrappers such as DataParallel."""
    found = (re.fullmatch(rf'((?:\w+\.)*?){pattern}', name) for name in tensors)
    prefix = next((match[1] for match in found if match), None)
    if prefix is None:
        return {}
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _choose_names(path: Path, count: int, names: Sequence[str] | None, in_file: Sequence[str]) -> tuple[str, ...]:
    """Choose the class names: those of the user, of the file, or of COCO."""
    chosen = tuple(names if names is not None else in_file)
    if not chosen:
        chosen = COCO if count == len(COCO) else tuple(f'class_{index}' for index in range(count))
    if len(chosen) != count:
        source = '--classes gives' if names is not None else 'it names'
        raise UserError(f'{path} has {count} classes, but {source} {len(chosen)} names: give one name a line')
    return chosen
