# SPDX-License-Identifier: Apache-2.0
"""Tracing of quantized modules to ONNX with one named node for each quantizer.

While a module is traced, every quantizer's ``forward`` is a single node ``mmzsq::FakeQuantize`` that carries the name
of the quantizer. Integers, steps and zero points are attached afterwards by :mod:`mmzsq.deploy.lower`, so nothing that
the tracer does to the rest of the graph can change them.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmzsq.deploy.graph import Graph, attribute
from mmzsq.errors import UserError
from mmzsq.patching import patched, patched_forwards
from mmzsq.quantization import LSQ, constant_input_scales, quantized_layers, quantizers
from mmzsq.typed_section import nearest

DOMAIN = 'mmzsq'
MARKER = 'FakeQuantize'
OPSET = 17
INT4_OPSET = 20
"""From this version on, operators mean the same as in opset 21, which adds INT4."""
EXPORTERS = ('torchscript', 'dynamo')


@dataclass(frozen=True)
class WeightGrid:
    """Trained integers of one weight.

    Attributes:
        layer: Name of the layer in the detector.
        integers: int8 of the shape of the layer's ``filters()``, (C_out, ...).
        step: float32 of shape (C_out,), or (1,) if all channels share one step.
        bits: 2 to 8.
    """

    layer: str
    integers: np.ndarray
    step: np.ndarray
    bits: int


@dataclass(frozen=True)
class ActivationGrid:
    """Grid of one activation: ``step * (clip(round(x / step) + zero_point, qmin, qmax) - zero_point)``.

    Attributes:
        step: Positive float32.
        zero_point: Integer that represents zero.
        qmin: Lowest integer.
        qmax: Highest integer.
        bits: 2 to 8.
    """

    step: float
    zero_point: int
    qmin: int
    qmax: int
    bits: int


@dataclass
class MarkedGraph:
    """A traced module.

    Attributes:
        model: ONNX model with one node ``mmzsq::FakeQuantize`` for each call of a quantizer. Its attribute ``name``
            is the name of the quantizer, ``call`` counts the calls of this quantizer from 0.
        weights: Weight grids by the name of the quantizer.
        activations: Activation grids by the name of the quantizer.
    """

    model: onnx.ModelProto
    weights: dict[str, WeightGrid] = field(default_factory=dict)
    activations: dict[str, ActivationGrid] = field(default_factory=dict)


@torch.no_grad()
def weight_grids(module: nn.Module) -> dict[str, WeightGrid]:
    """Read the integers of all quantized layers.

    Args:
        module: A model with quantized layers whose quantizers have steps.

    Returns:
        Grids by the name of the weight quantizer.
    """
    grids = {}
    for name, layer in quantized_layers(module):
        quantizer = layer.weight_quantizer
        if quantizer.enabled:
            _check_ready(f'{name}.weight_quantizer', quantizer)
            integers = quantizer.quantize(layer.filters()).cpu().numpy().astype(np.int8)
            grids[f'{name}.weight_quantizer'] = WeightGrid(
                name, integers, quantizer.step.detach().cpu().numpy().astype(np.float32), quantizer.bits
            )
    return grids


@torch.no_grad()
def activation_grids(module: nn.Module) -> dict[str, ActivationGrid]:
    """Read the grids of all quantizers of activations.

    Args:
        module: A model with quantized layers whose quantizers have steps.

    Returns:
        Grids by the name of the quantizer.

    Raises:
        UserError: If a quantizer has one step for each channel.
    """
    of_weights = {layer.weight_quantizer for _, layer in quantized_layers(module)}
    grids = {}
    for name, quantizer in quantizers(module):
        if quantizer in of_weights or not quantizer.enabled:
            continue
        _check_ready(name, quantizer)
        if quantizer.num_steps != 1:
            raise UserError(f'{name} has {quantizer.num_steps} steps, but an activation is exported with one step.')
        zero_point = quantizer.integer_zero_point
        grids[name] = ActivationGrid(
            step=float(quantizer.step),
            zero_point=0 if zero_point is None else int(zero_point),
            qmin=quantizer.qmin,
            qmax=quantizer.qmax,
            bits=quantizer.bits,
        )
    return grids


def check_exporter(exporter: str) -> None:
    """Refuse an unknown exporter, and the dynamo exporter without onnxscript.

    Raises:
        UserError: Names what is allowed, or what to install.
    """
    if exporter not in EXPORTERS:
        known = ', '.join(map(repr, EXPORTERS))
        raise UserError(f'exporter is {exporter!r}, but must be one of {known}.{nearest(exporter, EXPORTERS)}')
    if exporter == 'dynamo' and importlib.util.find_spec('onnxscript') is None:
        raise UserError('the dynamo exporter needs onnxscript: run `pip install onnxscript`, or use torchscript.')


@contextmanager
def marking(module: nn.Module) -> Iterator[None]:
    """Replace the ``forward`` of every enabled quantizer by one marker node inside the block.

    Args:
        module: The model that defines the names of the quantizers.
    """
    calls: dict[str, int] = {}

    def marker(name: str) -> Any:
        def forward(x: Tensor) -> Tensor:
            call = calls[name] = calls.get(name, -1) + 1
            return _mark(x, name, call)

        return forward

    forwards = {q: marker(name) for name, q in quantizers(module) if q.enabled}
    with constant_input_scales(module), patched_forwards(forwards):
        yield


def markers(graph: Graph) -> Iterator[tuple[str, int, NodeProto]]:
    """List the markers of a graph.

    Args:
        graph: A marked graph.

    Yields:
        Name of the quantizer, number of the call, node.
    """
    for node in list(graph.nodes):
        if node.domain == DOMAIN and node.op_type == MARKER:
            yield attribute(node, 'name'), attribute(node, 'call', 0), node


def export_marked(
    module: nn.Module,
    inputs: Tensor,
    *,
    root: nn.Module | None = None,
    input_name: str = 'images',
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    exporter: str = 'torchscript',
    opset: int = OPSET,
) -> MarkedGraph:
    """Trace a module to ONNX with markers.

    Args:
        module: Maps ``inputs`` to a flat tuple of tensors. It is traced in eval mode and without gradients.
        inputs: One example, (N, ...), on the device of the module.
        root: Model that defines the names of layers and quantizers. If None, it is ``module``.
        input_name: Name of the input of the graph.
        output_names: Names of the outputs. If None, the exporter chooses them.
        dynamic_batch: Leave the first dimension of inputs and outputs open.
        exporter: ``'torchscript'`` or ``'dynamo'``, which takes several times longer and needs onnxscript.
        opset: Version of ONNX's operators for the TorchScript exporter. The dynamo exporter chooses its own.

    Returns:
        The marked graph, with copies of integers and steps.

    Raises:
        UserError: If an operator has no counterpart in ONNX, or the exporter fails or is unknown.
    """
    check_exporter(exporter)
    root = module if root is None else root
    weights, activations = weight_grids(root), activation_grids(root)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_quiet())
        stack.enter_context(_evaluating(module))
        # MMDetection's branches for ONNX import modules that its version 3 no longer has.
        stack.enter_context(patched(torch.onnx, 'is_in_onnx_export', lambda: False))
        # The TorchScript exporter writes it as a loop over a sequence, which no runtime loads.
        stack.enter_context(patched(torch.Tensor, 'tensor_split', _split_at))
        stack.enter_context(patched(F, 'adaptive_avg_pool2d', partial(_pool_adaptively, F.adaptive_avg_pool2d)))
        trace = _trace_torchscript if exporter == 'torchscript' else _trace_dynamo
        model = trace(module, root, inputs, input_name, output_names, dynamic_batch, opset)
    _check_domains(model)
    return MarkedGraph(model, weights, activations)


def _trace_torchscript(
    module: nn.Module,
    root: nn.Module,
    inputs: Tensor,
    input_name: str,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
    opset: int,
) -> onnx.ModelProto:
    # torch.onnx.export takes files too, but its annotation names only paths.
    file: Any = io.BytesIO()
    names = list(output_names or ())
    options: dict[str, Any] = dict(input_names=[input_name], output_names=names or None, opset_version=opset)
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    # The exporter warns of a domain that the graph does not use, as that of a float detector.
    if any(quantizer.enabled for _, quantizer in quantizers(module)):
        options['custom_opsets'] = {DOMAIN: 1}
    if dynamic_batch:
        options['dynamic_axes'] = {name: {0: 'batch'} for name in (input_name, *names)}
    try:
        try:
            with marking(root):
                torch.onnx.export(module, (inputs,), file, **options)
        except torch.onnx.errors.SymbolicValueError:
            if dynamic_batch:
                raise
            file = io.BytesIO()
            with marking(root), _ConstantSizes():
                torch.onnx.export(module, (inputs,), file, **options)
    except UserError:
        raise
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        # The module has run on these inputs before, so the exporter, or code that it traces, is the cause.
        advice = ' Try it without --dynamic-batch.' if dynamic_batch and input_name == 'images' else ''
        raise UserError(
            f"The network cannot be exported: PyTorch's exporter does not take it ({_reason(error)}).{advice}"
        ) from error
    content: bytes = file.getvalue()
    file.close()
    return onnx.load_from_string(content)


def _reason(error: Exception) -> str:
    """Return the reason of an error of the exporter, in one line."""
    if isinstance(error, torch.onnx.errors.SymbolicValueError):
        unsupported = re.match(r'Unsupported: ONNX export of operator (.+?)\. Please', str(error))
        if unsupported:
            return unsupported[1]
        # The scope of the node is a path of CLASS::NAME.
        scope = re.search(r'scope: (?:\S*/)?(\S+)::', str(error))
        place = f'a number that {scope[1].rpartition(".")[2]} computes' if scope else 'a number'
        return f'{place} is not constant'
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _trace_dynamo(
    module: nn.Module,
    root: nn.Module,
    inputs: Tensor,
    input_name: str,
    output_names: Sequence[str] | None,
    dynamic_batch: bool,
    opset: int,
) -> onnx.ModelProto:
    shapes = ({0: torch.export.Dim('batch')},) if dynamic_batch else None
    # Sizes 0 and 1 are constants for this exporter.
    example = torch.cat((inputs, inputs)) if dynamic_batch and len(inputs) == 1 else inputs
    with marking(root):
        program: Any = torch.onnx.export(
            module,
            (example,),
            input_names=[input_name],
            output_names=list(output_names) if output_names else None,
            dynamic_shapes=shapes,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    return program.model_proto


class _ConstantSizes(TorchFunctionMode):
    """Make sizes of tensors plain numbers, as in a run.

    A traced size is a tensor, and numbers that a module computes from it, such as the kernel size of a pooling layer,
    are not always constant for the exporter.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.shape.__get__, torch.Tensor.size):  # type: ignore[attr-defined]
            return torch.Size(map(int, result)) if isinstance(result, tuple) else int(result)
        return result


class _Marker(torch.autograd.Function):
    """Identity that the TorchScript exporter writes as one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, call: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, call: int) -> Any:
        return g.op(f'{DOMAIN}::{MARKER}', x, name_s=name, call_i=call).setType(x.type())


def _mark(x: Tensor, name: str, call: int) -> Tensor:
    if torch.compiler.is_compiling():
        output: Tensor = torch.onnx.ops.symbolic(
            f'{DOMAIN}::{MARKER}', (x,), dict(name=name, call=call), dtype=x.dtype, shape=x.shape, version=1
        )
        return output
    output = _Marker.apply(x, name, call)
    return output


def _split_at(x: Tensor, indices: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """``Tensor.tensor_split`` by slices."""
    size = x.shape[dim]
    if isinstance(indices, int):
        short, longer = divmod(int(size), indices)
        ends = [short * (index + 1) + min(index + 1, longer) for index in range(indices - 1)]
    else:
        ends = [int(index) for index in indices]
    starts = [0, *ends]
    return tuple(x.narrow(dim, start, end - start) for start, end in zip(starts, [*ends, int(size)], strict=True))


def _pool_adaptively(pool: Callable[..., Tensor], x: Tensor, output_size: Any) -> Tensor:
    """Adaptive average pooling, also to a size that does not divide that of the map, which ONNX does not have."""
    sizes = [int(size) for size in x.shape[-2:]]
    targets = list(output_size) if isinstance(output_size, (tuple, list)) else [output_size] * 2
    targets = [size if target is None else int(target) for size, target in zip(sizes, targets, strict=True)]
    if all(size % target == 0 for size, target in zip(sizes, targets, strict=True)):
        return pool(x, output_size)
    rows, columns = (_window_means(size, target).to(x) for size, target in zip(sizes, targets, strict=True))
    return rows @ x @ columns.T


def _window_means(size: int, target: int) -> Tensor:
    """Return the matrix (target, size) that averages the windows of adaptive pooling in one dimension."""
    means = torch.zeros(target, size)
    for index in range(target):
        window = slice(index * size // target, -(-(index + 1) * size // target))
        means[index, window] = 1 / (window.stop - window.start)
    return means


def _check_ready(name: str, quantizer: LSQ) -> None:
    if not quantizer.ready:
        raise UserError(
            f'{name} has no step: the detector is not quantized yet. Export a checkpoint that '
            '`python -m mmzsq.train` has written.'
        )


def _check_domains(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.domain not in ('', 'ai.onnx', DOMAIN):
            raise UserError(
                f'The network cannot be exported: {node.name.strip("/") or "it"} needs the operator '
                f'{node.domain}::{node.op_type}, which ONNX does not have.'
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode inside the block."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' own warnings and graphs, which concern their developers."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    # Prints the whole graph after an error, whatever the log level.
    with warnings.catch_warnings(), patched(torch._C, '_jit_onnx_log', lambda *args: None):
        warnings.simplefilter('ignore')
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
