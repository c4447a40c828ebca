# SPDX-License-Identifier: Apache-2.0
"""Export of a quantized detector to ONNX files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.deploy.build import BuiltGraph, build
from mmzsq.deploy.dialects import check_target
from mmzsq.deploy.heads import DETECTOR, FEATURES, Part, parts_of
from mmzsq.deploy.markers import INT4_OPSET, OPSET, activation_grids, export_marked, weight_grids
from mmzsq.errors import UserError
from mmzsq.quantization import LSQ, quantized_layers, quantizers
from mmzsq.version import __version__

MAX_BUFFER = 4096
"""Most numbers of a head's buffer that go into the metadata."""


@dataclass(frozen=True)
class LayerExport:
    """One call of a quantized layer in a file.

    Attributes:
        file: Name of the file.
        layer: Name of the layer in the detector.
        call: Number of the call, from 0; heads that share a layer among levels call it once for each.
        operator: ONNX operator.
        w_bits: Bits of the weight.
        batch_norm: ``'folded'``, the reason why it was not, or None if there is none.
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
        target: Target that the files are written for.
        size: Height and width of the images, in pixels.
        outputs: ``'decoded'``, ``'raw'`` or ``'two-stage'``.
        layers: Every call of a quantized layer.
    """

    files: dict[str, str]
    bytes: dict[str, int]
    target: str
    size: tuple[int, int]
    outputs: str
    layers: list[LayerExport]

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
    exporter: str = 'torchscript',
    classes: Sequence[str] | None = None,
    pipeline: Sequence[Mapping[str, Any]] | None = None,
) -> DeployReport:
    """Write a quantized detector as ONNX.

    A dense detector becomes one file. A two-stage detector becomes ``path`` with backbone, neck and RPN, and beside it
    ``NAME.box_head.onnx`` and, if it predicts masks, ``NAME.mask_head.onnx``.

    Args:
        detector: Detector with quantized layers and steps, or the :class:`ZeroShotDetector` that holds it as
            ``student``.
        path: Of the main file, ending in ``.onnx``. Its folder is made.
        target: ``'openvino'``, ``'onnxruntime'`` or ``'tensorrt'``.
        size: Height and width of the images that the files take, in pixels.
        raw: End a dense detector at the raw maps of its head in place of decoded boxes and class scores.
        dynamic_batch: Leave the number of images open in place of 1.
        int4: Store weights of at most 4 bits as INT4: a smaller file, never a faster one.
        exporter: ``'torchscript'`` or ``'dynamo'``.
        classes: Class names for the metadata; those of ``detector.dataset_meta`` if None.
        pipeline: Test pipeline of the config, for the metadata.

    Returns:
        The report.

    Raises:
        UserError: If the detector is not quantized, the target cannot represent it, a module cannot be exported, it
            does not take images of ``size``, or the file cannot be written. No file is written then.
    """
    path = Path(path)
    if path.suffix != '.onnx':
        raise UserError(f'{path} does not end in .onnx.')
    check_target(target)
    detector = unwrap(detector)
    check_quantized(detector)
    parts = parts_of(detector, size, raw)
    outputs = 'two-stage' if parts[0].name == FEATURES else 'raw' if raw else 'decoded'
    common = _metadata(detector, target, size, outputs, classes, pipeline, int4)
    if outputs == 'two-stage':
        common['parts'] = json.dumps({part.name: _path_of(path, part.name).name for part in parts})
    contents: dict[str, bytes] = {}
    layers: list[LayerExport] = []
    slow: list[str] = []
    for part in parts:
        built = build_part(detector, part, target, dynamic_batch, int4, exporter, common)
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
    _warn_if_slow(target, slow, len(layers))
    make_directory(path.parent)
    # The main file, which names the others, comes last.
    for name in reversed(contents):
        write_atomically(_path_of(path, name), contents[name])
    files = {name: str(_path_of(path, name)) for name in contents}
    sizes = {name: len(content) for name, content in contents.items()}
    return DeployReport(files, sizes, target, size, outputs, layers)


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
        part: From :func:`~mmzsq.deploy.heads.parts_of`.
        target: As of :func:`export`.
        dynamic_batch: As of :func:`export`; heads that take regions always leave their number open.
        int4: As of :func:`export`.
        exporter: As of :func:`export`.
        metadata: Entries that all files of the detector share.
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
    return build(marked, target, int4, entries)


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
    """Refuse a float detector, and one whose quantizers have no steps.

    Raises:
        UserError: Says which command makes a quantized checkpoint.
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


def _path_of(path: Path, part: str) -> Path:
    return path if part in (DETECTOR, FEATURES) else path.with_name(f'{path.stem}.{part}.onnx')


def _metadata(
    detector: Any,
    target: str,
    size: tuple[int, int],
    outputs: str,
    classes: Sequence[str] | None,
    pipeline: Sequence[Mapping[str, Any]] | None,
    int4: bool,
) -> dict[str, str]:
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
        bits=bits_of(detector),
        int4='weights of at most 4 bits are stored as INT4, which engines compute in 8 bits or in float'
        if int4
        else False,
        buffers=_buffers(detector),
    )
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def resize_of(pipeline: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Describe how a test pipeline resizes images.

    Args:
        pipeline: Configs of transforms.

    Returns:
        ``mode``: ``'letterbox'`` (keep the aspect ratio, pad evenly on both sides), ``'keep_ratio'`` (pad at bottom
        and right) or ``'stretch'``; ``scale`` (width, height) in pixels; ``pad_value`` in [0, 255]. None if no
        transform resizes.
    """
    found: dict[str, Any] | None = None
    for transform in pipeline:
        kind = transform.get('type')
        name = str(kind if isinstance(kind, str) else getattr(kind, '__name__', kind)).rpartition('.')[2]
        if name == 'LetterResize':
            found = dict(mode='letterbox', scale=list(transform['scale']), pad_value=transform.get('pad_val', 114))
        elif name in ('Resize', 'FixScaleResize'):
            mode = 'keep_ratio' if transform.get('keep_ratio') else 'stretch'
            scale = transform.get('scale')
            found = dict(mode=mode, scale=None if scale is None else list(scale), pad_value=0)
        elif name == 'Pad' and found is not None:
            value = transform.get('pad_val', 0)
            found['pad_value'] = value.get('img', 0) if isinstance(value, Mapping) else value
    return found


def bits_of(detector: nn.Module) -> dict[str, list[int]]:
    """Return bits of weight and input of each quantized layer."""
    return {
        name: [layer.weight_quantizer.bits, layer.input_quantizer.bits] for name, layer in quantized_layers(detector)
    }


def _buffers(detector: nn.Module) -> dict[str, Any]:
    """Buffers that decoding reads outside of the graph, such as anchors that a checkpoint brings."""
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
