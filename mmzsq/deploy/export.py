# SPDX-License-Identifier: Apache-2.0
"""Export of a quantized detector to ONNX files."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import TwoStageDetector
from torch import Tensor, nn

from mmzsq.atomic_files import disk_errors, make_directory, write_atomically
from mmzsq.deploy.build import BuiltGraph, build
from mmzsq.deploy.dialects import check_target
from mmzsq.deploy.heads import DETECTOR, FEATURES, Part, parts_of
from mmzsq.deploy.markers import INT4_OPSET, OPSET, activation_grids, check_exporter, export_marked, weight_grids
from mmzsq.deploy.nms import DETECTIONS, LAYOUT, NmsSettings, append_nms, nms_of
from mmzsq.deploy.standalone import selection_of
from mmzsq.errors import UserError
from mmzsq.pipelines import resize_of
from mmzsq.quantization import LSQ, quantized_layers, quantizers
from mmzsq.version import __version__

FLOAT = 'float'
MAX_BUFFER = 4096
"""Largest number of elements of a buffer that goes into the metadata."""


@dataclass(frozen=True)
class LayerExport:
    """One call of a quantized layer in a file.

    Attributes:
        file: Name of the file.
        layer: Name of the layer in the detector.
        call: Number of the call, from 0; heads that share a layer among levels call it once for each.
        operator: ONNX operator.
        w_bits: Bits of the weight.
        batch_norm: ``'folded'``, or the reason why the BatchNorm behind the layer stayed, or None if there is none.
        int4: Whether the weight is stored as INT4.
    """

    file: str
    layer: str
    call: int
    operator: str
    w_bits: int
    batch_norm: str | None
    int4: bool


@dataclass(frozen=True)
class DeployReport:
    """Result of an export.

    Attributes:
        files: Path of each file by the name of its part; the main file first.
        bytes: Size of each file by the name of its part.
        target: Target that the files are written for; ``'float'`` for a float detector.
        size: Height and width of the images, in pixels.
        outputs: ``'decoded'``, ``'raw'`` or ``'two-stage'``.
        layers: Every call of a quantized layer.
        int4: Whether weights of at most 4 bits are stored as INT4.
    """

    files: dict[str, str]
    bytes: dict[str, int]
    target: str
    size: tuple[int, int]
    outputs: str
    layers: list[LayerExport]
    int4: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        return asdict(self)


def export(
    detector: nn.Module,
    path: str | Path,
    target: str = 'openvino',
    size: tuple[int, int] = (640, 640),
    *,
    raw: bool = False,
    dynamic_batch: bool = False,
    int4: bool = False,
    nms: bool = False,
    exporter: str = 'torchscript',
    classes: Sequence[str] | None = None,
    pipeline: Sequence[Mapping[str, Any]] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> DeployReport:
    """Write a quantized detector as ONNX.

    A dense detector becomes one file. A two-stage detector becomes ``path`` with backbone, neck and RPN, and beside it
    ``NAME.box_head.onnx`` and, if it predicts masks, ``NAME.mask_head.onnx``.

    Args:
        detector: Detector with quantized layers and steps, or the :class:`ZeroShotDetector` that holds it as
            ``student``.
        path: Path of the main file, ending in ``.onnx``. Missing folders are created.
        target: ``'openvino'``, ``'onnxruntime'`` or ``'tensorrt'``.
        size: Height and width of the images that the files take, in pixels.
        raw: End the graph of a dense detector at the raw maps of its head, not at decoded boxes and class scores.
        dynamic_batch: Leave the number of images open. If False, it is 1.
        int4: Store weights of at most 4 bits as INT4: a smaller file, never a faster one.
        nms: Append NMS to a dense detector, as a third output ``detections``, see :mod:`mmzsq.deploy.nms`.
        exporter: ``'torchscript'`` or ``'dynamo'``.
        classes: Class names for the metadata. If None, they are read from ``detector.dataset_meta``.
        pipeline: Test pipeline of the config, for the metadata.
        on_progress: Called with ``'graphs'``, the number of graphs that are traced and lowered, and their total number.

    Returns:
        Files, sizes and layers.

    Raises:
        UserError: If the detector is not quantized, the target cannot represent it, a module cannot be exported, it
            does not take images of ``size``, options exclude each other, or the file cannot be written. No file is
            written then.
    """
    check_target(target)
    check_exporter(exporter)
    detector = unwrap(detector)
    check_quantized(detector)
    if int4:
        _check_int4(detector)
    settings = _nms_settings(detector, raw, dynamic_batch) if nms else None
    return _export(
        detector, path, target, size, raw, dynamic_batch, int4, exporter, classes, pipeline, settings, on_progress
    )


def export_float(
    detector: nn.Module,
    path: str | Path,
    size: tuple[int, int] = (640, 640),
    *,
    raw: bool = False,
    dynamic_batch: bool = False,
    exporter: str = 'torchscript',
    classes: Sequence[str] | None = None,
    pipeline: Sequence[Mapping[str, Any]] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> DeployReport:
    """Write a float detector as ONNX with the same inputs and outputs, to compare size, speed and detections.

    Args:
        detector: Detector without quantized layers.
        path: As of :func:`export`.
        size: As of :func:`export`.
        raw: As of :func:`export`.
        dynamic_batch: As of :func:`export`.
        exporter: As of :func:`export`.
        classes: As of :func:`export`.
        pipeline: As of :func:`export`.
        on_progress: As of :func:`export`.

    Returns:
        The report, with the target ``'float'`` and without layers.

    Raises:
        UserError: If the detector is quantized, and as :func:`export`.
    """
    if any(True for _ in quantized_layers(detector)):
        raise UserError('The detector is quantized: use export, or build the detector of the float config.')
    check_exporter(exporter)
    return _export(
        detector, path, FLOAT, size, raw, dynamic_batch, False, exporter, classes, pipeline, None, on_progress
    )


def _export(
    detector: nn.Module,
    path: str | Path,
    target: str,
    size: tuple[int, int],
    raw: bool,
    dynamic_batch: bool,
    int4: bool,
    exporter: str,
    classes: Sequence[str] | None,
    pipeline: Sequence[Mapping[str, Any]] | None,
    settings: NmsSettings | None,
    on_progress: Callable[[str, int, int], None],
) -> DeployReport:
    path = Path(path)
    if path.suffix != '.onnx':
        raise UserError(f'{path} does not end in .onnx.')
    check_writable(path)
    parts = parts_of(detector, size, raw)
    outputs = 'two-stage' if parts[0].name == FEATURES else 'raw' if raw else 'decoded'
    common = metadata_of(detector, target, size, outputs, classes, pipeline, int4, settings)
    if outputs == 'two-stage':
        common['parts'] = json.dumps({part.name: _path_of(path, part.name).name for part in parts})
    contents: dict[str, bytes] = {}
    layers: list[LayerExport] = []
    slow: list[str] = []
    on_progress('graphs', 0, len(parts))
    for done, part in enumerate(parts, 1):
        built = build_part(detector, part, target, dynamic_batch, int4, exporter, common)
        if settings is not None:
            append_nms(built.model, settings)
        slow += built.slow
        contents[part.name] = built.model.SerializeToString()
        layers += [
            LayerExport(
                _path_of(path, part.name).name,
                use.layer,
                use.call,
                use.node.op_type,
                use.bits,
                'folded' if use.folded else use.unfolded,
                use.layer in built.int4_layers,
            )
            for use in built.uses
        ]
        on_progress('graphs', done, len(parts))
    _warn_if_slow(target, slow, len(layers))
    make_directory(path.parent)
    # The main file, which names the others, comes last.
    for name in reversed(contents):
        write_atomically(_path_of(path, name), contents[name])
    files = {name: str(_path_of(path, name)) for name in contents}
    sizes = {name: len(content) for name, content in contents.items()}
    return DeployReport(files, sizes, target, size, outputs, layers, int4)


def build_part(
    detector: nn.Module,
    part: Part,
    target: str,
    dynamic_batch: bool = False,
    int4: bool = False,
    exporter: str = 'torchscript',
    metadata: Mapping[str, str] | None = None,
) -> BuiltGraph:
    """Trace and lower one part of a detector.

    Args:
        detector: Model that defines the names of the layers.
        part: A result of :func:`~mmzsq.deploy.heads.parts_of`.
        target: Target, see :func:`export`.
        dynamic_batch: Leave the number of images open. The number of regions is always open.
        int4: Store weights of at most 4 bits as INT4.
        exporter: ``'torchscript'`` or ``'dynamo'``.
        metadata: Metadata that all files of the detector share.

    Returns:
        The lowered graph.
    """
    entries = dict(metadata or {}, part=part.name, structure=json.dumps(part.structure))
    if part.locations:
        entries['locations'] = json.dumps(part.locations)
    marked = export_marked(
        part.module,
        part.example,
        root=detector,
        input_name=part.input_name,
        output_names=part.output_names,
        dynamic_batch=dynamic_batch or part.input_name == 'regions',
        exporter=exporter,
        opset=INT4_OPSET if int4 else OPSET,
    )
    # Without quantizers, the graph is the same for all targets.
    return build(marked, 'onnxruntime' if target == FLOAT else target, int4, entries)


def _warn_if_slow(target: str, slow: list[str], layers: int) -> None:
    """Warn that a file will be slower than a float one, and say how to train one that is not."""
    if target == 'onnxruntime' and 2 * len(slow) > layers:
        warnings.warn(
            f'The file will be slower than a float one: ONNX Runtime computes {len(slow)} of {layers} layers in float, '
            "since no grid stands behind them; train with zsq.quantizer.target='onnxruntime'.",
            stacklevel=3,
        )
    if target == 'tensorrt' and slow:
        warnings.warn(
            f'TensorRT will compute {len(slow)} operators in float, the first of them {slow[0]} Train with '
            "zsq.quantizer.target='tensorrt'.",
            stacklevel=3,
        )


def unwrap(detector: Any) -> nn.Module:
    """Return the student of a model that holds teacher and student, else the detector itself."""
    student = getattr(detector, 'student', None)
    return student if isinstance(student, nn.Module) else detector


def check_quantized(detector: nn.Module) -> None:
    """Refuse a float detector and a detector whose quantizers have no steps.

    Raises:
        UserError: Names the command that makes a quantized checkpoint.
    """
    if not any(True for _ in quantized_layers(detector)):
        raise UserError(
            'The detector has no quantized layers: export a checkpoint that `python -m mmzsq.train` has written, '
            'with its config.'
        )
    if not any(quantizer.enabled for _, quantizer in quantizers(detector)):
        raise UserError('Quantization is switched off: call set_quantization(model, True) before the export.')
    weight_grids(detector)
    activation_grids(detector)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before minutes go into its content.

    Args:
        path: Of a file whose folders may be missing.

    Raises:
        UserError: If the folder, or the nearest one that exists, takes no files.
    """
    if path.is_dir():
        raise UserError(f'{path} is a folder: name a file.')
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with disk_errors(path), tempfile.TemporaryFile(dir=folder):
        pass


def _check_int4(detector: nn.Module) -> None:
    bits = {weights for weights, _ in bits_of(detector).values()}
    if min(bits) > 4:
        raise UserError(
            f'--int4 stores weights of at most 4 bits, but the weights of this detector have '
            f'{" and ".join(map(str, sorted(bits)))} bits: export without --int4.'
        )


def _nms_settings(detector: Any, raw: bool, dynamic_batch: bool) -> NmsSettings:
    if isinstance(detector, TwoStageDetector):
        raise UserError(
            f'--nms is for dense detectors, but {type(detector).__name__} has two stages, whose NMS the predictor runs '
            'between its files: export without --nms.'
        )
    for given, option in ((raw, '--raw'), (dynamic_batch, '--dynamic-batch')):
        if given:
            raise UserError(f'--nms needs decoded boxes of one image: export without {option}, or without --nms.')
    head = getattr(detector, 'bbox_head', None)
    if head is None:
        raise UserError(f'--nms is for dense detectors, but {type(detector).__name__} has no bbox_head.')
    return nms_of(head)


def _path_of(path: Path, part: str) -> Path:
    return path if part in (DETECTOR, FEATURES) else path.with_name(f'{path.stem}.{part}.onnx')


def metadata_of(
    detector: Any,
    target: str,
    size: tuple[int, int],
    outputs: str,
    classes: Sequence[str] | None,
    pipeline: Sequence[Mapping[str, Any]] | None,
    int4: bool = False,
    nms: NmsSettings | None = None,
) -> dict[str, str]:
    """Return the entries that all files of a detector share.

    Args:
        detector: The quantized detector.
        target: As of :func:`export`.
        size: As of :func:`export`.
        outputs: ``'decoded'``, ``'raw'`` or ``'two-stage'``.
        classes: As of :func:`export`.
        pipeline: As of :func:`export`.
        int4: As of :func:`export`.
        nms: Settings of appended NMS, None if there is none.

    Returns:
        Text, or JSON for values of other types, by key.
    """
    preprocessor = detector.data_preprocessor
    if classes is None:
        classes = (getattr(detector, 'dataset_meta', None) or {}).get('classes')
    entries: dict[str, Any] = dict(
        mmzsq_version=__version__,
        detector=type(detector).__name__,
        target=target,
        size=list(size),
        outputs=outputs,
        classes=None if classes is None else list(classes),
        mean=_numbers(getattr(preprocessor, 'mean', None), 0.0),
        std=_numbers(getattr(preprocessor, 'std', None), 1.0),
        bgr_to_rgb=bool(getattr(preprocessor, '_channel_conversion', False)),
        pad_value=float(getattr(preprocessor, 'pad_value', 0)),
        resize=resize_of(pipeline or ()),
        pipeline=[_plain(transform) for transform in pipeline or ()],
        selection=selection_of(detector.bbox_head) if outputs == 'decoded' else None,
        bits=bits_of(detector),
        output_bits=output_bits_of(detector),
        int4='weights of at most 4 bits are stored as INT4, which engines compute in 8 bits or in float'
        if int4
        else False,
        nms=None if nms is None else dict(asdict(nms), output=DETECTIONS, layout=LAYOUT),
        buffers=_buffers(detector),
    )
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def _plain(value: Any) -> Any:
    """Config values as JSON holds them: classes by name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, '__name__', str(value))


def bits_of(detector: nn.Module) -> dict[str, list[int]]:
    """Return bits of weight and input of each quantized layer."""
    return {
        name: [layer.weight_quantizer.bits, layer.input_quantizer.bits] for name, layer in quantized_layers(detector)
    }


def output_bits_of(detector: nn.Module) -> dict[str, int]:
    """Return bits of the output of each module that has a trained grid behind it (``zsq.quantizer.outputs``)."""
    found = {}
    for name, module in detector.named_modules():
        for key in ('output_quantizer', 'sigmoid_quantizer'):
            quantizer = getattr(module, key, None)
            if isinstance(quantizer, LSQ) and quantizer.enabled:
                found[name if key == 'output_quantizer' else f'{name}.sigmoid'] = quantizer.bits
    return found


def _buffers(detector: nn.Module) -> dict[str, Any]:
    """Return buffers of heads that decoding outside the graph reads, such as anchors from a checkpoint."""
    found = {}
    for name, module in detector.named_modules():
        inside = name.split('.')[0] in ('bbox_head', 'rpn_head', 'roi_head')
        if not inside or isinstance(module, (LSQ, nn.modules.batchnorm._NormBase)):
            continue
        for key, value in module.named_buffers(recurse=False):
            if key != 'input_scale' and value.numel() <= MAX_BUFFER and value.is_floating_point():
                found[f'{name}.{key}'] = value.tolist()
    return found


def _numbers(value: Tensor | None, default: float) -> list[float]:
    return [default] * 3 if value is None else [float(number) for number in torch.as_tensor(value).flatten()]
