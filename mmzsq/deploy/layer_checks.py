# SPDX-License-Identifier: Apache-2.0
"""Checks of single layers of an exported file, and of what lies between them.

A file is cut at the outputs of its quantized layers. Each piece runs alone, fed the values that PyTorch computed, so
that no difference of one layer reaches the next:

* The piece from the input of a layer's quantizer to the output of its operator. Its integers, steps, zero point and
  bias must equal those of training, with the BatchNorm folded in.
* The piece from the outputs of other layers to this input: activation functions, sums, poolings, concatenations.

Together, the pieces cover every node that an output of the file depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.deploy.dialects import container
from mmzsq.deploy.differences import equal_in_float32, mean_difference, relative_difference
from mmzsq.deploy.fold import LEAST_STEP
from mmzsq.deploy.graph import Graph, sources
from mmzsq.deploy.grid_checks import (
    entry_of,
    grid_fault,
    integers_equal,
    on_grid_values,
    quantizer_name,
    rounding_fault,
    within_steps,
)
from mmzsq.deploy.heads import Part
from mmzsq.deploy.markers import ActivationGrid, activation_grids, weight_grids
from mmzsq.deploy.place import DATA_INPUTS
from mmzsq.deploy.runtime import Session
from mmzsq.quantization import QuantizedLayer, quantizers

TOLERANCE = 1e-5
"""Largest difference of a piece's output, relative to its largest value."""
PROBABILITIES = {'scores': 0.1, 'factors': 0.1}
"""Least value to which a difference is relative, of outputs in [0, 1]: sigmoids of engines are off by up to 1e-7."""
QUANTIZED_TOLERANCE = 1e-4
"""Largest mean difference, relative to the mean, of a piece that holds quantizers, such as those of attention."""
ROUNDING_FACTOR = 4.0
"""Largest difference of a piece's output, relative to what the rounding of its inputs to float32 changes."""


@dataclass
class LayerCheck:
    """One call of a layer.

    Attributes:
        file: Name of the part.
        layer: Name of the layer.
        call: Number of the call.
        integers_equal: Whether all integers equal those of training.
        difference: Largest difference of the output of the layer alone, relative to its largest value; None if it was
            not computed.
        input_difference: The same for the values that reach the layer from the layers before it.
        reason: Why the layer fails, None if it passes.
    """

    file: str
    layer: str
    call: int
    integers_equal: bool
    difference: float | None
    input_difference: float | None
    reason: str | None


class PieceError(Exception):
    """A file that cannot be cut as training prescribes; the message says why."""


@dataclass
class _Call:
    """One call of a quantized layer in PyTorch.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        number: Number of the call.
        x: Input of its input quantizer.
        output: Its output.
        bn: The BatchNorm that reads its output, or None.
        normalized: Output of this BatchNorm.
    """

    name: str
    layer: Any
    number: int
    x: Tensor
    output: Tensor
    bn: Any = None
    normalized: Tensor | None = None


@torch.no_grad()
def check_layers(
    detector: nn.Module,
    part: Part,
    content: bytes,
    inputs: Tensor,
    runtime: str,
    target: str,
    on_check: Callable[[str], None] = lambda layer: None,
) -> tuple[list[LayerCheck], list[str]]:
    """Check every quantized layer of one file, and what lies between the layers.

    Args:
        detector: The quantized detector, in eval mode.
        part: A part of it.
        content: The file of this part.
        inputs: Input of the part.
        runtime: The engine.
        target: Target that the file was written for.
        on_check: Called with the name of a layer after each call of it was checked.

    Returns:
        One entry for each call of a layer, in the order of PyTorch's calls, and one sentence for each failure that
        belongs to no layer.
    """
    pieces = _Pieces(detector, part, content, inputs, runtime, target)
    failures = pieces.check_quantizers()

    def check(call: _Call) -> None:
        pieces.check(call)
        on_check(call.name)

    with _watching(detector, check):
        expected = part.module(inputs)
    failures += pieces.check_outputs(expected)
    return pieces.checks, failures


class _Pieces:
    """A file that is cut at the outputs of its quantized layers, while PyTorch runs."""

    def __init__(
        self, detector: nn.Module, part: Part, content: bytes, inputs: Tensor, runtime: str, target: str
    ) -> None:
        self.part, self.runtime, self.target = part, runtime, target
        self.graph = Graph(onnx.load_from_string(content))
        self.full = self.graph.to_model()
        self.tensors = {tensor.name: tensor for tensor in self.full.graph.initializer}
        self.order = {id(node): index for index, node in enumerate(self.graph.nodes)}
        self.integers = {grid.layer: grid for grid in weight_grids(detector).values()}
        self.grids = activation_grids(detector)
        # Layers may share a quantizer, which then has the name that it has in the first of them.
        self.names = {quantizer: name for name, quantizer in quantizers(detector)}
        self.values: dict[str, Tensor] = {self.graph.inputs[0]: inputs}
        self.checks: list[LayerCheck] = []
        self.weights: dict[tuple[str, int], NodeProto] = {}
        for node in self.graph.nodes:
            if node.op_type == 'DequantizeLinear' and node.name.endswith('/dequantize') and '/weight/' in node.name:
                layer, _, call = node.name.removesuffix('/dequantize').rpartition('/weight/')
                self.weights[layer, int(call)] = node

    def check_quantizers(self) -> list[str]:
        """Compare every quantizer of the file with the quantizer of the detector that it names."""
        failures = []
        for node in self.graph.nodes:
            if node.op_type != 'QuantizeLinear':
                continue
            name = quantizer_name(node)
            reason: str | None = 'training has no such quantizer.'
            if name in self.grids:
                reason = grid_fault(self.graph, node, self.grids[name]) or self._zero_point_fault(name, node)
            if reason:
                failures.append(f'{name or node.name}: {reason}')
        return failures

    def _zero_point_fault(self, name: str, node: NodeProto) -> str | None:
        given = self.graph.constants[node.input[2]]
        expected = container(name, self.grids[name], self.target)
        if (given.dtype, int(given)) == (expected.dtype, expected.zero_point):
            return None
        return f'the zero point is {int(given)} ({given.dtype}), but must be {expected.zero_point} ({expected.dtype}).'

    def check(self, call: _Call) -> None:
        """Check one call of a layer; its output then feeds the pieces behind it."""
        weight = self.weights.get((call.name, call.number))
        if weight is None:
            # Calls whose result nothing reads are no part of the file.
            return
        check = LayerCheck(self.part.name, call.name, call.number, False, None, None, None)
        self.checks.append(check)
        operator = self.graph.consumers(weight.output[0])[0]
        output = self._output_of(operator, call.layer)
        keeps = any(reader.op_type == 'BatchNormalization' for reader in self.graph.consumers(output))
        expected = call.output if keeps or call.normalized is None else call.normalized
        self.values[output] = expected
        try:
            check.reason = self._check(check, call, weight, operator, output, None if keeps else call.bn, expected)
        except PieceError as error:
            check.reason = str(error)

    def _check(
        self,
        check: LayerCheck,
        call: _Call,
        weight: NodeProto,
        operator: NodeProto,
        output: str,
        bn: Any,
        expected: Tensor,
    ) -> str | None:
        gain, shift = _affine(bn)
        trained = self.integers[call.name]
        sign = np.where(gain < 0, -1, 1)
        check.integers_equal = integers_equal(self.graph, weight, operator, trained.integers, sign)
        if not check.integers_equal:
            return 'integers differ from those of training.'
        # A gamma of 0 leaves no step; the file holds the least one, with integers that then count for nothing.
        step = np.maximum(trained.step.astype(np.float64) * np.abs(gain), LEAST_STEP)
        if not equal_in_float32(step, self.graph.constants[weight.input[1]]):
            return 'the step of the weight differs from that of training.'
        bias = call.layer.bias
        bias = np.zeros(()) if bias is None else bias.detach().cpu().double().numpy()
        if not equal_in_float32(bias * gain + shift, self._bias_of(operator, call.layer)):
            return 'the bias differs from that of training.'
        quantizer, entry = self._quantizer_of(operator)
        grid = self.grids[self.names[call.layer.input_quantizer]]
        fault = grid_fault(self.graph, quantizer, grid)
        if fault:
            return f'at its input, {fault}'
        dequantized = next(iter(self.graph.consumers(quantizer.output[0]))).output[0]
        rounded = call.layer.input_quantizer(call.x)
        # Without a Clip of its own, a quantizer of few bits gets values that lie on its grid already.
        settled = entry == quantizer.input[0] and grid.qmax - grid.qmin < 255
        given = self._run(
            self._nodes_between([dequantized], {entry}), {entry: rounded if settled else call.x}, dequantized
        )
        fault = rounding_fault(call.x, rounded, torch.from_numpy(given).to(rounded), grid)
        if fault:
            return fault
        # On the grid, so that no value lies half way between two levels.
        given = self._run(self._nodes_between([output], {entry}), {entry: rounded}, output)
        check.difference = relative_difference(expected.cpu().numpy(), given)
        if check.difference > TOLERANCE:
            return f'alone, it differs from PyTorch by {check.difference:.1e} of its largest output.'
        check.input_difference, fault = self._check_between(entry, call.x, grid)
        return f'the values that reach it {fault}' if fault else None

    def check_outputs(self, expected: Sequence[Tensor]) -> list[str]:
        """Check the piece between the last layers and the outputs."""
        failures = []
        for name, value in zip(self.part.output_names, expected, strict=True):
            try:
                fault = self._check_between(name, value, None, PROBABILITIES.get(name, 0.0))[1]
            except PieceError as error:
                fault = str(error)
            if fault:
                failures.append(f'output {name} of {self.part.name}: the values behind the last layers {fault}')
        return failures

    def _check_between(
        self, value: str, expected: Tensor, grid: ActivationGrid | None, least: float = 0.0
    ) -> tuple[float, str | None]:
        """Compute a value of the file from outputs of layers, and compare it with PyTorch's.

        Quantizers with the grid ``grid`` that reach the value through operators that keep values are left out: they
        were repeated there, and rounding twice to one grid changes nothing.
        """
        nodes, found, quantized = self._between(value, grid)
        given = self._run(nodes, {name: self.values[name] for name in found}, value)
        if quantized:
            difference = mean_difference(expected, torch.from_numpy(given))
            fault = f'differ from PyTorch by {difference:.1e} of their mean.'
            if difference <= QUANTIZED_TOLERANCE or (grid is not None and within_steps(expected, given, grid.step)):
                return difference, None
            if grid is not None:
                # The layer rounds what reaches it. One side may be rounded to this grid already, for another reader of
                # the value: then all values differ by less than a step, and a few by those of the grids before.
                on_grid = mean_difference(on_grid_values(expected, grid), on_grid_values(torch.from_numpy(given), grid))
                if on_grid <= QUANTIZED_TOLERANCE:
                    return on_grid, None
            return difference, fault
        difference = relative_difference(expected.cpu().numpy(), given, least)
        fault = f'differ from PyTorch by {difference:.1e} of the largest.'
        if difference <= TOLERANCE or difference <= self._rounding(nodes, found, value, given, least):
            return difference, None
        if grid is not None and mean_difference(expected, on_grid_values(expected, grid)) <= TOLERANCE:
            # PyTorch rounded the value to this grid already, for all its readers.
            on_grid = mean_difference(expected, on_grid_values(torch.from_numpy(given), grid))
            if on_grid <= QUANTIZED_TOLERANCE:
                return on_grid, None
        return difference, fault

    def _rounding(
        self, nodes: Sequence[NodeProto], found: Sequence[str], value: str, given: np.ndarray, least: float
    ) -> float:
        """Difference that the rounding of float32 explains: what it changes if all that enters is rounded once more.

        The softmax of attention amplifies the rounding of large products of queries and keys.
        """
        generator = torch.Generator().manual_seed(0)
        rounding = torch.finfo(torch.float32).eps
        changed = {
            name: x * (1 + rounding * torch.randint(-1, 2, x.shape, generator=generator).to(x))
            for name, x in ((name, self.values[name]) for name in found)
        }
        return ROUNDING_FACTOR * relative_difference(given, self._run(nodes, changed, value), least)

    def _between(self, value: str, grid: ActivationGrid | None) -> tuple[list[NodeProto], list[str], bool]:
        """Collect the nodes between a value and outputs of layers.

        Returns:
            Nodes in topological order, names of the values that feed them, and whether a quantizer is among them.
        """
        of_weights = {id(node) for node in self.weights.values()}
        nodes: dict[int, NodeProto] = {}
        feeding: list[str] = []
        quantized = False
        pending = [(value, grid is not None)]
        while pending:
            name, kept = pending.pop()
            producer = self.graph.producer(name)
            if name in self.values:
                feeding.append(name)
            elif producer is not None and id(producer) not in nodes:
                if id(producer) in of_weights:
                    raise PieceError(f'depend on {producer.name.rpartition("/weight/")[0]}, which PyTorch runs later.')
                quantized = quantized or self._check_quantizer_between(producer)
                kept = kept and not producer.domain and producer.op_type in DATA_INPUTS
                copied = NodeProto()
                copied.CopyFrom(producer)
                for index, source in enumerate(producer.input):
                    if kept and grid is not None:
                        copied.input[index] = self._without_quantizer(source, grid)
                nodes[id(producer)] = copied
                pending += [(source, kept) for source in sources(copied) if source not in self.graph.constants]
        order = sorted(nodes, key=lambda key: self.order[key])
        return [nodes[key] for key in order], list(dict.fromkeys(feeding)), quantized

    def _check_quantizer_between(self, node: NodeProto) -> bool:
        """Whether a node is a quantizer of neither a weight nor a layer's input; the latter must not be there."""
        if node.op_type != 'QuantizeLinear':
            return False
        name = quantizer_name(node)
        if name.endswith('.input_quantizer'):
            raise PieceError(f'pass {name}, which belongs directly in front of its layer.')
        return True

    def _without_quantizer(self, value: str, grid: ActivationGrid) -> str:
        """Name of a value before [Clip,] QuantizeLinear and DequantizeLinear, if their grid is ``grid``."""
        dequantize = self.graph.producer(value)
        quantize = None if dequantize is None else self.graph.producer(dequantize.input[0])
        if dequantize is None or quantize is None or dequantize.op_type != 'DequantizeLinear':
            return value
        return value if grid_fault(self.graph, quantize, grid) else entry_of(self.graph, quantize)

    def _output_of(self, operator: NodeProto, layer: Any) -> str:
        if self._adds_bias(operator) and getattr(layer, 'bias', None) is not None:
            add = next((r for r in self.graph.consumers(operator.output[0]) if r.op_type == 'Add'), None)
            return operator.output[0] if add is None else add.output[0]
        return operator.output[0]

    @staticmethod
    def _adds_bias(operator: NodeProto) -> bool:
        """Whether an Add behind the operator holds its bias, if there is one."""
        return operator.op_type == 'MatMul' or (operator.op_type == 'Gemm' and len(operator.input) == 2)

    def _bias_of(self, operator: NodeProto, layer: Any) -> np.ndarray:
        if self._adds_bias(operator):
            add = self.graph.producer(self._output_of(operator, layer))
            names = [name for name in add.input if name in self.graph.constants] if add is not None else []
        else:
            names = [name for name in operator.input[2:3] if name]
        return self.graph.constants.get(names[0], np.full((), np.nan)) if names else np.zeros(())

    def _quantizer_of(self, operator: NodeProto) -> tuple[NodeProto, str]:
        """Find the QuantizeLinear in front of an operator, and the value that enters it."""
        pending = list(sources(operator))
        while pending:
            producer = self.graph.producer(pending.pop(0))
            if producer is None:
                continue
            if producer.op_type == 'QuantizeLinear':
                return producer, entry_of(self.graph, producer)
            if producer.op_type in ('DequantizeLinear', 'Pad', *DATA_INPUTS):
                pending += sources(producer)
        raise PieceError('it has no quantizer at its input.')

    def _nodes_between(self, outputs: Sequence[str], inputs: set[str]) -> list[NodeProto]:
        nodes: dict[int, NodeProto] = {}
        pending = list(outputs)
        while pending:
            name = pending.pop()
            producer = self.graph.producer(name)
            if name in inputs or producer is None or id(producer) in nodes:
                continue
            nodes[id(producer)] = producer
            pending += sources(producer)
        return [nodes[key] for key in sorted(nodes, key=lambda key: self.order[key])]

    def _run(self, nodes: Sequence[NodeProto], feeds: Mapping[str, Tensor], output: str) -> np.ndarray:
        """Run nodes alone on one thread."""
        read = {name for node in nodes for name in sources(node)}
        feeds = {name: value for name, value in feeds.items() if name in read or name == output}
        if not nodes:
            if output in feeds:
                return feeds[output].cpu().numpy()
            if output in self.graph.constants:
                return self.graph.constants[output]
            raise PieceError(f'depend on {output}, which is no output of a layer.')
        outside = read - set(feeds) - set(self.tensors) - {name for node in nodes for name in node.output}
        if outside:
            raise PieceError(f'depend on {min(outside)}, which is no output of a layer.')
        proto = helper.make_graph(
            nodes,
            'piece',
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape))
                for name, value in feeds.items()
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [tensor for name, tensor in self.tensors.items() if name in read],
        )
        model = helper.make_model(proto, opset_imports=list(self.full.opset_import))
        model.ir_version = self.full.ir_version
        session = Session(model.SerializeToString(), self.runtime, threads=1)
        return session(*(value.contiguous().cpu().numpy() for value in feeds.values()))[0]


def _affine(bn: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gain and shift of a BatchNorm in eval mode, in float64; of none, 1 and 0."""
    if bn is None:
        return np.ones(()), np.zeros(())
    mean, variance = (value.detach().cpu().double().numpy() for value in (bn.running_mean, bn.running_var))
    gain = 1 / np.sqrt(variance + bn.eps)
    shift = np.zeros_like(gain)
    if bn.affine:
        gain = gain * bn.weight.detach().cpu().double().numpy()
        shift = bn.bias.detach().cpu().double().numpy()
    return gain, shift - mean * gain


@contextmanager
def _watching(detector: nn.Module, check: Callable[[_Call], None]) -> Iterator[None]:
    """Call ``check`` for each call of a quantized layer, with the output of a BatchNorm that reads its output."""
    pending: list[tuple[_Call, Tensor, int]] = []
    inputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def flush() -> None:
        if pending:
            check(pending.pop()[0])

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            flush()
            inputs[name] = args[0].detach().clone()

        return hook

    def finish(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            number = calls[name] = calls.get(name, -1) + 1
            # A copy: activation functions may work in place.
            call = _Call(name, layer, number, inputs.pop(name), output.detach().clone())
            pending.append((call, output, output._version))

        return hook

    def normalize(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        call, made, version = pending[-1] if pending else (None, None, 0)
        # An activation function that works in place returns the same tensor, but is no BatchNorm's to fold.
        if call is not None and args[0] is made and made._version == version:
            call.bn, call.normalized = module, output.detach().clone()
            flush()

    with ExitStack() as stack:
        for name, module in detector.named_modules():
            if isinstance(module, QuantizedLayer):
                stack.callback(module.input_quantizer.register_forward_pre_hook(remember(name)).remove)
                # Before the hooks that put outputs on a trained grid.
                stack.callback(module.register_forward_hook(finish(name), prepend=True).remove)
            elif isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_hook(normalize, prepend=True).remove)
        yield
        flush()
