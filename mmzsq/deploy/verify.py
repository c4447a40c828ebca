# SPDX-License-Identifier: Apache-2.0
"""Verification of exported files against the detector in PyTorch.

Five checks, of which the first three are exact up to the rounding of float32:

1. The metadata are those of the detector, and images normalized by them equal those of its data preprocessor.
2. Integers, steps, zero points and biases in the files equal those of training, with the BatchNorms folded in.
3. Each layer alone, and what lies between the layers, gives PyTorch's values when fed PyTorch's values
   (:mod:`mmzsq.deploy.layer_checks`).
4. The outputs of each file differ from PyTorch's by no more than PyTorch differs from itself. An 8-bit network cannot
   agree better: another order of summation moves values across a border between two levels, and layers amplify it.
5. Detections on images agree.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import onnx
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.deploy.agreement import LARGE_NOISE, NOISE, NOISE_DRAWS, References, agreement, detect, disturbing
from mmzsq.deploy.differences import mean_difference
from mmzsq.deploy.export import DeployReport, metadata_of, unwrap
from mmzsq.deploy.graph import Graph
from mmzsq.deploy.heads import Part, parts_of
from mmzsq.deploy.layer_checks import PROBABILITIES, LayerCheck, check_layers
from mmzsq.deploy.nms import DETECTIONS, NmsSettings, nms_of, suppress
from mmzsq.deploy.predictor import detector_of
from mmzsq.deploy.runtime import Session
from mmzsq.quantization import quantized_layers

NOISE_FACTOR = 1.5
"""Largest mean difference at the outputs of a file, relative to the largest of PyTorch against itself there."""
NOISE_FLOOR = 1e-5
"""Difference, relative to the mean, that is always allowed."""
MAX_DISAGREEMENT = 0.1
"""Largest shortfall of the agreement on detections behind that of PyTorch with itself."""
DETECTION_PASSES = NOISE_DRAWS + 2
"""Passes over the samples that compare detections: of the file, and of PyTorch with other roundings."""
WEIGHTED_KINDS = ('Convolution', 'GroupConvolution', 'Deconvolution', 'FullyConnected', 'MatMul')
"""Types of OpenVINO's executed operators that multiply by a weight."""


@dataclass
class OutputCheck:
    """One output of a file.

    Attributes:
        file: Name of the part.
        output: Name of the output.
        difference: Mean difference from PyTorch relative to the mean. ONNX Runtime runs without rounding biases here.
        difference_as_run: The same as the runtime runs the file by default. ONNX Runtime then rounds biases to the grid
            of the products, which shows in layers of few bits.
        noise: That of PyTorch from itself, the largest of the outputs of the file: in another memory format, and,
            unless this suffices to pass, with quantizer inputs changed by 1e-6 and 1e-5 of the largest.
        floor: Difference that is always allowed.
    """

    file: str
    output: str
    difference: float
    difference_as_run: float
    noise: float
    floor: float = NOISE_FLOOR

    @property
    def passed(self) -> bool:
        """Whether the difference is one that PyTorch has from itself."""
        return self.difference <= max(NOISE_FACTOR * self.noise, self.floor)


@dataclass
class VerifyReport:
    """Result of :func:`verify`.

    Attributes:
        runtime: The engine that was compared.
        layers: One entry for each call of a layer.
        outputs: One entry for each output.
        agreement: Part of the detections that both find, in [0, 1]; None if it was not measured.
        self_agreement: The same for PyTorch and PyTorch in another memory format, the least of several draws of noise
            unless fewer show that the file agrees as well.
        images: Number of images that ``agreement`` was measured on.
        detections: Number of detections that were compared, those of both.
        float_layers: Layers that the engine does not compute in 8 bits; known for OpenVINO alone.
        failures: One sentence for each failure, empty if all checks pass.
    """

    runtime: str
    layers: list[LayerCheck] = field(default_factory=list)
    outputs: list[OutputCheck] = field(default_factory=list)
    agreement: float | None = None
    self_agreement: float | None = None
    images: int = 0
    detections: int = 0
    float_layers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether detections agree about as well as those of PyTorch with itself; true if they were not compared."""
        if self.agreement is None or self.self_agreement is None:
            return True
        return self.agreement >= self.self_agreement - MAX_DISAGREEMENT

    @property
    def passed(self) -> bool:
        """Whether every check passes."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        return dict(asdict(self), passed=self.passed)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_atomically(Path(path), to_json(self.to_dict(), indent=2))


@torch.no_grad()
def verify(
    detector: nn.Module,
    exported: DeployReport,
    images: Tensor | None = None,
    runtime: str = 'openvino',
    model: Mapping[str, Any] | None = None,
    references: References | None = None,
    threads: int = 0,
    classes: Sequence[str] | None = None,
    pipeline: Sequence[Mapping[str, Any]] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> VerifyReport:
    """Compare exported files with the detector they come from.

    Args:
        detector: The quantized detector.
        exported: The report of its export.
        images: Normalized images (N, 3, H, W) of the files' size; only the first is used for layers and outputs.
            Random values if None.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        model: Section ``model`` of the float detector's config; needed to compare detections.
        references: The detector's detections on samples of the test pipeline, to compare the file's with. One object
            serves all runtimes.
        threads: Number of threads; 0 lets the runtime decide.
        classes: Class names as they were given to the export.
        pipeline: Test pipeline as it was given to the export.
        on_progress: Called with a phase, the number of its steps that are done, and their total number: ``'layers'``
            that were checked alone, and passes over the samples to compare ``'detections'``.

    Returns:
        The report; it names what fails.
    """
    detector = unwrap(detector)
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    report = VerifyReport(runtime)
    unchecked = {name for name, _ in quantized_layers(detector)}
    total = len(unchecked)
    on_progress('layers', 0, total)

    def note(layer: str) -> None:
        # A layer may run several times.
        if layer in unchecked:
            unchecked.remove(layer)
            on_progress('layers', total - len(unchecked), total)

    try:
        generator = torch.Generator().manual_seed(0)
        if images is None:
            images = torch.randn(1, 3, *exported.size, generator=generator)
        images = images[:1].to(next(detector.parameters()).device)
        for part in parts_of(detector, exported.size, exported.outputs == 'raw'):
            content = Path(exported.files[part.name]).read_bytes()
            inputs = images if part.input_name == 'images' else torch.rand(part.example.shape, generator=generator)
            report.failures += check_metadata(detector, exported, content, classes, pipeline)
            layers, failures = check_layers(detector, part, content, inputs, runtime, exported.target, note)
            report.layers += layers
            report.failures += failures
            session = Session(content, runtime, threads)
            exact = Session(content, runtime, threads, exact=True) if runtime == 'onnxruntime' else session
            report.outputs += check_outputs(detector, part, exact, session, inputs)
            report.failures += check_detections(session, inputs)
            if runtime == 'openvino':
                report.float_layers += float_layers(session, content)
        _check_complete(detector, report)
        if references is not None and model is not None:
            on_progress('detections', 0, DETECTION_PASSES)
            deployed = detector_of(next(iter(exported.files.values())), model, runtime, threads)
            found = detect(deployed, references.samples)
            _compare_detections(report, references, found, on_progress)
    finally:
        for module, training in modes.items():
            module.training = training
    report.failures[:0] = [
        f'{check.layer} (call {check.call}): {check.reason}' for check in report.layers if check.reason
    ]
    report.failures += [
        f'output {check.output} of {check.file}: it differs from PyTorch by {check.difference:.1e} of its mean, '
        f'PyTorch from itself by {check.noise:.1e}.'
        for check in report.outputs
        if not check.passed
    ]
    if not report.agrees:
        report.failures.append(
            f'{report.agreement:.0%} of the detections agree on {report.images} images, but '
            f'{report.self_agreement:.0%} of PyTorch with itself.'
        )
    return report


def _compare_detections(
    report: VerifyReport,
    references: References,
    found: Sequence[InstanceData],
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> None:
    """Enter the agreement on detections, and that of PyTorch with itself by as many draws as decide the check."""
    report.agreement = agreement(references.own, found)
    report.detections = sum(map(len, (*references.own, *found)))
    report.images = len(found)
    report.self_agreement = 1.0
    for draw in range(1 + NOISE_DRAWS):
        on_progress('detections', draw + 1, DETECTION_PASSES)
        other = references.disturbed(draw, rounds_biases=report.runtime == 'onnxruntime')
        report.self_agreement = min(agreement(references.own, other), report.self_agreement)
        if report.agrees:
            break
    on_progress('detections', DETECTION_PASSES, DETECTION_PASSES)


def _check_complete(detector: nn.Module, report: VerifyReport) -> None:
    """Every layer that ran in PyTorch is in a file; :func:`check_layers` has entered the others."""
    seen = {check.layer for check in report.layers}
    report.failures += [
        f'{name}: it is in none of the files.' for name, _ in quantized_layers(detector) if name not in seen
    ]


def check_metadata(
    detector: Any,
    exported: DeployReport,
    content: bytes,
    classes: Sequence[str] | None,
    pipeline: Sequence[Mapping[str, Any]] | None,
) -> list[str]:
    """Compare the metadata of a file with the detector, and normalize an image by them.

    Args:
        detector: The quantized detector.
        exported: The report of the export.
        content: A file of it.
        classes: As of :func:`verify`.
        pipeline: As of :func:`verify`.

    Returns:
        One sentence for each failure.
    """
    model = onnx.load_from_string(content)
    given = {entry.key: entry.value for entry in model.metadata_props}
    nms = json.loads(given.get('nms', 'null'))
    settings = nms_of(detector.bbox_head) if nms else None
    expected = metadata_of(
        detector, exported.target, exported.size, exported.outputs, classes, pipeline, exported.int4, settings
    )
    failures = [
        f'metadata {key}: it is {_shortened(given.get(key))}, but must be {_shortened(value)}.'
        for key, value in expected.items()
        if given.get(key) != value
    ]
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    if model.graph.input[0].name == 'images' and tuple(shape[2:]) != exported.size:
        failures.append(f'input images: it is {shape[2]}x{shape[3]} pixels, not {exported.size[0]}x{exported.size[1]}.')
    if not failures:
        failures += _normalization_fault(detector, given)
    return failures


def _normalization_fault(detector: Any, metadata: Mapping[str, str]) -> list[str]:
    """Normalize one image by the metadata and by the detector's own data preprocessor."""
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    sample = DetDataSample(metainfo=dict(img_shape=(8, 8), ori_shape=(8, 8), scale_factor=(1.0, 1.0)))
    batch = dict(inputs=[torch.from_numpy(image)], data_samples=[sample])
    expected = detector.data_preprocessor(batch, False)['inputs'][0, :, :8, :8].cpu().numpy()
    mean, std = (np.asarray(json.loads(metadata[key]), np.float32)[:, None, None] for key in ('mean', 'std'))
    given = ((image[::-1] if json.loads(metadata['bgr_to_rgb']) else image).astype(np.float32) - mean) / std
    if np.allclose(expected, given, rtol=1e-5, atol=1e-5):
        return []
    return ['metadata mean, std, bgr_to_rgb: they do not normalize an image as the data preprocessor does.']


def _shortened(value: str | None) -> str:
    return 'missing' if value is None else shorten(value, 80)


def check_detections(session: Session, inputs: Tensor) -> list[str]:
    """Compare the NMS of a file with torchvision's, on the boxes and scores of the file.

    Args:
        session: The file.
        inputs: Input of the file.

    Returns:
        One sentence if they differ.
    """
    nms = json.loads(session.metadata.get('nms', 'null'))
    if not nms:
        return []
    settings = NmsSettings(**{key: nms[key] for key in NmsSettings.__dataclass_fields__})
    outputs = dict(zip(session.outputs, session(inputs.cpu().numpy()), strict=True))
    boxes, scores, detections = (outputs[name] for name in ('boxes', 'scores', DETECTIONS))
    expected = suppress(torch.from_numpy(boxes)[0], torch.from_numpy(scores)[0], settings).numpy()
    # Equal scores have no order.
    if expected.shape == detections.shape and np.allclose(_sorted(expected), _sorted(detections), rtol=1e-5, atol=1e-4):
        return []
    return [f'output detections: {len(detections)} detections, not the {len(expected)} of NMS in torchvision.']


def _sorted(detections: np.ndarray) -> np.ndarray:
    return detections[np.lexsort(detections.T)]


def check_outputs(
    detector: nn.Module, part: Part, exact: Session, session: Session, inputs: Tensor
) -> list[OutputCheck]:
    """Compare the outputs of one file with PyTorch, and PyTorch with itself.

    Args:
        detector: The quantized detector.
        part: A part of it.
        exact: The file of this part, without rounded biases.
        session: The file as the runtime runs it by default.
        inputs: Input of the part.
    """
    expected = part.module(inputs)
    given = exact(inputs.cpu().numpy())
    as_run = given if exact is session else session(inputs.cpu().numpy())
    checks = [
        OutputCheck(
            part.name,
            name,
            mean_difference(value, torch.from_numpy(given[index])),
            mean_difference(value, torch.from_numpy(as_run[index])),
            0.0,
            _floor(name, value),
        )
        for index, (name, value) in enumerate(zip(part.output_names, expected, strict=True))
    ]
    for other in _other_outputs(detector, part, inputs):
        noise = max(mean_difference(value, changed) for value, changed in zip(expected, other, strict=True))
        for check in checks:
            check.noise = max(check.noise, noise)
        if all(check.passed for check in checks):
            break
    return checks


def _floor(name: str, value: Tensor) -> float:
    """Return the difference of an output, relative to its mean, that is always allowed."""
    # Nearly all scores of a trained detector are tiny, while the error of a sigmoid in float32 does not depend on them.
    mean = max(float(value.abs().mean()), NOISE_FLOOR)
    return NOISE_FLOOR * max(1.0, PROBABILITIES.get(name, 0.0) / mean)


def _other_outputs(detector: nn.Module, part: Part, inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the outputs of PyTorch in another memory format, and with other rounding of the quantizers' inputs."""
    twin = copy.deepcopy(part.module).to(memory_format=torch.channels_last)
    yield twin(inputs.contiguous(memory_format=torch.channels_last))
    for noise in (NOISE, LARGE_NOISE):
        for seed in range(NOISE_DRAWS):
            with disturbing(detector, torch.Generator().manual_seed(seed), noise):
                yield part.module(inputs)


def float_layers(session: Session, content: bytes) -> list[str]:
    """List quantized convolutions and matrix products that OpenVINO does not run in 8 bits.

    Args:
        session: A file opened by OpenVINO.
        content: The file.

    Returns:
        Names of operators as OpenVINO reports them.
    """
    graph = Graph(onnx.load_from_string(content))
    quantized = {
        reader.name
        for node in graph.nodes
        if node.op_type == 'DequantizeLinear' and node.input[0] in graph.constants
        for reader in graph.consumers(node.output[0])
    }
    return [
        name
        for names, kind, precision in session.executed()
        if kind in WEIGHTED_KINDS and precision not in ('u8', 'i8')
        for name in names
        if name in quantized
    ]
