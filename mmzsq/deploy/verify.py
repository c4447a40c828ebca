# SPDX-License-Identifier: Apache-2.0
"""Verification of exported files against the detector in PyTorch.

Four checks, of which the first two are exact:

1. Every weight integer in the files equals that of training, up to the sign of a folded BatchNorm.
2. Each layer alone, fed the same input, gives the output of PyTorch.
3. The outputs of each file differ from PyTorch's by no more than PyTorch differs from itself. An 8-bit network cannot
   agree better: another order of summation moves values across a border between two levels, and layers amplify it.
4. Detections on images agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import box_iou

from mmzsq.atomic_files import to_json, write_atomically
from mmzsq.deploy.export import DeployReport, unwrap
from mmzsq.deploy.graph import Graph, attribute, sources
from mmzsq.deploy.heads import Part, parts_of
from mmzsq.deploy.markers import weight_grids
from mmzsq.deploy.predictor import detector_of
from mmzsq.deploy.runtime import Session
from mmzsq.quantization import QuantizedLayer, quantized_layers, quantizers

TOLERANCE = 1e-5
"""Largest difference of a layer's output, relative to its largest value."""
NOISE_FACTOR = 1.5
"""Largest mean difference at the outputs, relative to that of PyTorch against itself."""
NOISE = 1e-6
"""Change of the inputs of quantizers, relative to the largest, that measures how PyTorch differs from itself."""
NOISE_DRAWS = 4
NOISE_FLOOR = 1e-3
"""Difference, relative to the mean, that is always allowed: engines may round a bias to the grid of the products."""
MIN_IOU = 0.75
MAX_DISAGREEMENT = 0.1
"""Largest shortfall of the agreement on detections behind that of PyTorch with itself."""
WEIGHTED_KINDS = ('Convolution', 'GroupConvolution', 'Deconvolution', 'FullyConnected', 'MatMul')
"""Types of OpenVINO's executed operators that multiply by a weight."""


@dataclass
class LayerCheck:
    """One call of a layer.

    Attributes:
        file: Name of the part.
        layer: Name of the layer.
        call: Number of the call.
        integers_equal: Whether all integers equal those of training.
        difference: Largest difference of the output relative to its largest value; None if it was not computed.
        reason: Why the layer fails, None if it passes.
    """

    file: str
    layer: str
    call: int
    integers_equal: bool
    difference: float | None
    reason: str | None


@dataclass
class OutputCheck:
    """One output of a file.

    Attributes:
        file: Name of the part.
        output: Name of the output.
        difference: Mean difference from PyTorch relative to the mean.
        noise: That of PyTorch from itself: in another memory format, and with quantizer inputs changed by 1e-6 of the
            largest.
    """

    file: str
    output: str
    difference: float
    noise: float

    @property
    def passed(self) -> bool:
        """Whether the difference is one that PyTorch has from itself."""
        return self.difference <= max(NOISE_FACTOR * self.noise, NOISE_FLOOR)


@dataclass
class VerifyReport:
    """Result of :func:`verify`.

    Attributes:
        runtime: The engine that was compared.
        layers: One entry for each call of a layer.
        outputs: One entry for each output.
        agreement: Part of the detections that both find, in [0, 1]; None if it was not measured.
        self_agreement: The same for PyTorch and PyTorch in another memory format.
        images: Number of images that ``agreement`` was measured on.
        float_layers: Layers that the engine does not compute in 8 bits; known for OpenVINO alone.
        failures: One sentence for each failure, empty if all checks pass.
    """

    runtime: str
    layers: list[LayerCheck] = field(default_factory=list)
    outputs: list[OutputCheck] = field(default_factory=list)
    agreement: float | None = None
    self_agreement: float | None = None
    images: int = 0
    float_layers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check passes."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists."""
        return dict(asdict(self), passed=self.passed)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, such as ``deploy.json`` beside the model."""
        write_atomically(Path(path), to_json(self.to_dict(), indent=2))


@torch.no_grad()
def verify(
    detector: nn.Module,
    exported: DeployReport,
    images: Tensor | None = None,
    runtime: str = 'openvino',
    model: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    threads: int = 0,
) -> VerifyReport:
    """Compare exported files with the detector they come from.

    Args:
        detector: The quantized detector.
        exported: The report of its export.
        images: Normalized images (N, 3, H, W) of the files' size; only the first is used for layers and outputs.
            Random values if None.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        model: Section ``model`` of the float detector's config; needed to compare detections.
        samples: Items of the test pipeline, ``dict(inputs=..., data_samples=...)``, to compare detections on.
        threads: Number of threads; 0 lets the runtime decide.

    Returns:
        The report; it names what fails.
    """
    detector = unwrap(detector)
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    report = VerifyReport(runtime)
    try:
        generator = torch.Generator().manual_seed(0)
        if images is None:
            images = torch.randn(1, 3, *exported.size, generator=generator)
        images = images[:1].to(next(detector.parameters()).device)
        for part in parts_of(detector, exported.size, exported.outputs == 'raw'):
            content = Path(exported.files[part.name]).read_bytes()
            inputs = images if part.input_name == 'images' else torch.rand(part.example.shape, generator=generator)
            report.layers += check_layers(detector, part, content, inputs, runtime)
            session = Session(content, runtime, threads)
            report.outputs += check_outputs(detector, part, session, inputs)
            if runtime == 'openvino':
                report.float_layers += float_layers(session, content)
        _check_complete(detector, report)
        if samples and model is not None:
            deployed = detector_of(next(iter(exported.files.values())), model, runtime, threads)
            report.agreement, report.images = agreement(detector, deployed, samples), len(samples)
            twin = copy.deepcopy(detector).to(memory_format=torch.channels_last)
            report.self_agreement = agreement(detector, twin, samples)
    finally:
        for module, training in modes.items():
            module.training = training
    report.failures += [f'{check.layer} (call {check.call}): {check.reason}' for check in report.layers if check.reason]
    report.failures += [
        f'output {check.output} of {check.file}: it differs from PyTorch by {check.difference:.1e} of its mean, '
        f'PyTorch from itself by {check.noise:.1e}.'
        for check in report.outputs
        if not check.passed
    ]
    if report.agreement is not None and report.self_agreement is not None:
        if report.agreement < report.self_agreement - MAX_DISAGREEMENT:
            report.failures.append(
                f'{report.agreement:.0%} of the detections agree on {report.images} images, but '
                f'{report.self_agreement:.0%} of PyTorch with itself.'
            )
    return report


def _check_complete(detector: nn.Module, report: VerifyReport) -> None:
    """Every layer that ran in PyTorch is in a file; :func:`check_layers` has entered the others."""
    seen = {check.layer for check in report.layers}
    report.failures += [
        f'{name}: it is in none of the files.' for name, _ in quantized_layers(detector) if name not in seen
    ]


def check_layers(detector: nn.Module, part: Part, content: bytes, inputs: Tensor, runtime: str) -> list[LayerCheck]:
    """Check integers and output of each quantized layer of one file.

    A layer is cut out of the file with its quantizers and run alone. OpenVINO gets inputs that lie on the grid: it
    rounds by another formula, which may decide otherwise for values half way between two levels.

    Args:
        detector: The quantized detector.
        part: A part of it.
        content: The file of this part.
        inputs: Input of the part.
        runtime: The engine.

    Returns:
        One entry for each call of a layer, in the order of PyTorch's calls.
    """
    graph = Graph(onnx.load_from_string(content))
    grids = {grid.layer: grid for grid in weight_grids(detector).values()}
    weights: dict[tuple[str, int], NodeProto] = {}
    for node in graph.nodes:
        if node.op_type == 'DequantizeLinear' and node.name.endswith('/dequantize') and '/weight/' in node.name:
            layer, _, call = node.name.removesuffix('/dequantize').rpartition('/weight/')
            weights[layer, int(call)] = node
    checks: list[LayerCheck] = []

    def check(name: str, layer: Any, call: int, x: Tensor, output: Tensor, normalized: Tensor | None) -> None:
        node = weights.get((name, call))
        if node is None:
            # Calls whose result nothing reads are no part of the file.
            return
        operator = graph.consumers(node.output[0])[0]
        equal = integers_equal(graph, node, operator, grids[name].integers)
        reason = None if equal else 'integers differ from those of training.'
        alone = _cut_out(graph, operator, layer, x)
        expected = output if normalized is None or alone.keeps_batch_norm else normalized
        fed = layer.input_quantizer(x) if runtime == 'openvino' else x
        given = Session(alone.model.SerializeToString(), runtime, threads=1)(fed.cpu().numpy())[0]
        difference = relative_difference(expected.cpu().numpy(), given)
        if reason is None and difference > TOLERANCE:
            reason = f'alone, it differs from PyTorch by {difference:.1e} of its largest output.'
        checks.append(LayerCheck(part.name, name, call, equal, difference, reason))

    with _watching(detector, check):
        part.module(inputs)
    return checks


def relative_difference(expected: np.ndarray, given: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value; infinite for unlike shapes and NaN."""
    if expected.shape != given.shape or not np.isfinite(given).all():
        return float('inf')
    largest = float(np.abs(expected).max(initial=0.0))
    difference = float(np.abs(expected - given).max(initial=0.0))
    return difference / largest if largest else difference


def integers_equal(graph: Graph, node: NodeProto, operator: NodeProto, trained: np.ndarray) -> bool:
    """Compare the integers of a DequantizeLinear with those of training.

    Args:
        graph: Graph that holds the node.
        node: The DequantizeLinear of a weight.
        operator: The operator that reads it.
        trained: Integers of training, (C_out, ...).

    Returns:
        Whether each output channel equals that of training, or its negative where a BatchNorm was folded.
    """
    stored = graph.constants[node.input[0]].astype(np.int32)
    transposed = operator.op_type in ('ConvTranspose', 'MatMul')
    axis = attribute(node, 'axis') if graph.constants[node.input[1]].ndim else None
    stored = np.moveaxis(stored, (1 if transposed else 0) if axis is None else axis, 0)
    if stored.shape != trained.shape:
        return False
    stored, expected = stored.reshape(len(stored), -1), trained.astype(np.int32).reshape(len(trained), -1)
    return bool(((stored == expected).all(1) | (stored == -expected).all(1)).all())


@dataclass
class _Alone:
    model: onnx.ModelProto
    keeps_batch_norm: bool


def _cut_out(graph: Graph, operator: NodeProto, layer: Any, x: Tensor) -> _Alone:
    """Make a model of one layer, from the input of its quantizer to the output of its operator."""
    readers = graph.consumers(operator.output[0])
    keeps = any(reader.op_type == 'BatchNormalization' for reader in readers)
    output = operator.output[0]
    nodes: list[NodeProto] = []
    if operator.op_type == 'MatMul' and getattr(layer, 'bias', None) is not None:
        add = next(reader for reader in readers if reader.op_type == 'Add')
        nodes.append(add)
        output = add.output[0]
    entry: str | None = None
    pending, seen = [operator], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        nodes.append(node)
        if node.op_type == 'QuantizeLinear':
            clip = graph.producer(node.input[0])
            # A Clip that is part of the quantizer, not one of the network's.
            if clip is not None and clip.op_type == 'Clip' and clip.name.endswith('/clip'):
                nodes.append(clip)
                entry = clip.input[0]
            else:
                entry = node.input[0]
            continue
        pending += [source for name in sources(node) if (source := graph.producer(name)) is not None]
    if entry is None:
        raise ValueError(f'{operator.name} has no quantizer at its input')
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    nodes.sort(key=lambda node: order[id(node)])
    full = graph.to_model()
    constants = {name for node in nodes for name in sources(node)} & set(graph.constants)
    proto = helper.make_graph(
        nodes,
        'layer',
        [helper.make_tensor_value_info(entry, TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [tensor for tensor in full.graph.initializer if tensor.name in constants],
    )
    model = helper.make_model(proto, opset_imports=list(full.opset_import))
    model.ir_version = full.ir_version
    return _Alone(model, keeps)


@contextmanager
def _watching(detector: nn.Module, check: Callable[..., None]) -> Iterator[None]:
    """Call ``check`` for each call of a quantized layer, with the output of a BatchNorm that reads its output."""
    pending: list[tuple[str, Any, int, Tensor, Tensor, Tensor]] = []
    inputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def flush(normalized: Tensor | None = None) -> None:
        if pending:
            name, layer, call, x, copied, _ = pending.pop()
            check(name, layer, call, x, copied, normalized)

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            flush()
            inputs[name] = args[0].detach().clone()

        return hook

    def finish(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            # A copy: activation functions may work in place.
            pending.append((name, layer, call, inputs.pop(name), output.detach().clone(), output))

        return hook

    def normalize(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if pending and args[0] is pending[-1][-1]:
            flush(output.detach().clone())

    with ExitStack() as stack:
        for name, module in detector.named_modules():
            if isinstance(module, QuantizedLayer):
                stack.callback(module.input_quantizer.register_forward_pre_hook(remember(name)).remove)
                stack.callback(module.register_forward_hook(finish(name), prepend=True).remove)
            elif isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_hook(normalize, prepend=True).remove)
        yield
        flush()


def check_outputs(detector: nn.Module, part: Part, session: Session, inputs: Tensor) -> list[OutputCheck]:
    """Compare the outputs of one file with PyTorch, and PyTorch with itself.

    Args:
        detector: The quantized detector.
        part: A part of it.
        session: The file of this part.
        inputs: Input of the part.
    """
    expected = part.module(inputs)
    others = []
    for seed in range(NOISE_DRAWS):
        with _disturbing(detector, torch.Generator().manual_seed(seed)):
            others.append(part.module(inputs))
    twin = copy.deepcopy(part.module).to(memory_format=torch.channels_last)
    others.append(twin(inputs.contiguous(memory_format=torch.channels_last)))
    given = session(inputs.cpu().numpy())
    return [
        OutputCheck(
            part.name,
            name,
            mean_difference(value, torch.from_numpy(given[index])),
            max(mean_difference(value, other[index]) for other in others),
        )
        for index, (name, value) in enumerate(zip(part.output_names, expected, strict=True))
    ]


@contextmanager
def _disturbing(detector: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Change the input of each activation quantizer by :data:`NOISE`, as another order of summation does."""
    of_weights = {layer.weight_quantizer for _, layer in quantized_layers(detector)}

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
        return (x + noise * (NOISE * x.abs().max()), *args[1:])

    with ExitStack() as stack:
        for _, quantizer in quantizers(detector):
            if quantizer not in of_weights:
                stack.callback(quantizer.register_forward_pre_hook(disturb).remove)
        yield


def mean_difference(expected: Tensor, given: Tensor) -> float:
    """Return the mean difference relative to the mean of the expected values."""
    expected, given = expected.double().cpu(), given.double().cpu()
    scale = float(expected.abs().mean())
    difference = float((expected - given).abs().mean())
    return difference / scale if scale else difference


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


@torch.no_grad()
def agreement(detector: Any, deployed: Any, samples: Sequence[Mapping[str, Any]], score_thr: float = 0.3) -> float:
    """Return the part of detections that two detectors share.

    Args:
        detector: The detector in PyTorch.
        deployed: The detector that runs the file.
        samples: Items of the test pipeline.
        score_thr: Least score of a detection that is compared.

    Returns:
        2 * pairs / (detections of one + detections of the other), where a pair has one label and an IoU of at least
        0.75; 1 if there are no detections.
    """
    pairs = total = 0
    for sample in samples:
        found = []
        for model in (detector, deployed):
            data = copy.deepcopy(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
            instances = model.test_step(data)[0].pred_instances.cpu()
            found.append(instances[instances.scores >= score_thr])
        total += len(found[0]) + len(found[1])
        if len(found[0]) and len(found[1]):
            overlap = box_iou(found[0].bboxes, found[1].bboxes)
            same = found[0].labels[:, None] == found[1].labels
            pairs += _count_pairs(torch.where(same, overlap, torch.zeros_like(overlap)))
    return 2 * pairs / total if total else 1.0


def _count_pairs(overlap: Tensor) -> int:
    """Count pairs of an IoU of at least :data:`MIN_IOU`, each box in one at most, the best first."""
    count = 0
    while overlap.numel() and float(overlap.max()) >= MIN_IOU:
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        overlap[row], overlap[:, column] = 0.0, 0.0
        count += 1
    return count
