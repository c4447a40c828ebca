# SPDX-License-Identifier: Apache-2.0
"""Quantized outputs: grids on values between layers, which some engines need to compute them in integers.

OpenVINO needs a grid only on the input of each layer. ONNX Runtime runs an operator in integers if a grid stands
directly behind it. TensorRT adds a shortcut in integers if a grid stands on it. :func:`watching` records in one run
which values are made and who reads them, :func:`choose_grids` decides which values get a grid, and :func:`add_grids`
attaches the quantizers to the modules that return these values.

For ONNX Runtime the grids are:

* The output of a convolution or linear layer, after the BatchNorm that reads it. Layers that make the model's output
  get none. A value that only layers with one grid read needs no second one, and neither does one that only a ReLU
  reads: ONNX Runtime merges the ReLU with the grid behind it.
* The output of an activation function and the sum of a shortcut, unless all their readers share one grid.
* The sigmoid inside of a SiLU, whose grid is fixed: multiples of 1/256.

All layers that read one value, or a part or another arrangement of it, share the quantizer of their inputs, which is
also that of the value if it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
from mmcv.cnn.bricks.swish import Swish
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from mmzsq.quantization.config import QuantizationConfig
from mmzsq.quantization.modules import QuantizedLayer, input_scale
from mmzsq.quantization.quantizers import LSQ

ADDITIONS = ('add', 'add_', '__add__', '__radd__', '__iadd__')
KEEPING = (
    '__getitem__', 'cat', 'chunk', 'clone', 'concat', 'contiguous', 'detach', 'dropout', 'expand', 'flatten', 'float',
    'max_pool2d', 'movedim', 'narrow', 'permute', 'reshape', 'roll', 'split', 'squeeze', 'stack', 'swapaxes', 'to',
    'transpose', 'type', 'unbind', 'unflatten', 'unsqueeze', 'view',
)  # fmt: skip
"""Functions that select or rearrange values, or take maxima: a grid means the same before and after them."""
RELU = ('relu', 'relu_')
FUNCTIONS = ('silu', 'silu_', 'leaky_relu', 'gelu', 'hardswish', 'relu6', 'mish', 'sigmoid')
CLIPPING = (nn.ReLU,)
ACTIVATIONS = (
    nn.SiLU, Swish, nn.LeakyReLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Sigmoid, nn.ReLU6,
)  # fmt: skip
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that call each of their children: a quantizer inside would be called as well."""


class SigmoidGrid(LSQ):
    """Grid of a sigmoid: multiples of 1/256 from 0 to 255/256. Nothing is learned, and it has no state."""

    in_float_model: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(8, 'unsigned', step='linear')
        del self.linear_step, self.initialized
        self.register_buffer('linear_step', torch.full((1,), 1 / 256), persistent=False)
        self.register_buffer('initialized', torch.tensor(True), persistent=False)
        self._ready = True

    @property
    def _step_parameter(self) -> Any:
        return self.linear_step


class _QuantizedSiLU(nn.Module):
    """SiLU whose sigmoid lies on a grid, as ONNX Runtime computes it."""

    sigmoid_quantizer: SigmoidGrid

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same."""
        return x * self.sigmoid_quantizer(torch.sigmoid(x))


class QuantSiLU(_QuantizedSiLU, nn.SiLU):
    """``nn.SiLU`` with a quantized sigmoid."""


class QuantSwish(_QuantizedSiLU, Swish):
    """MMCV's ``Swish`` with a quantized sigmoid."""


SIGMOID_PRODUCTS: dict[type[nn.Module], type[_QuantizedSiLU]] = {nn.SiLU: QuantSiLU, Swish: QuantSwish}


@dataclass(eq=False)
class Value:
    """A tensor of the run.

    Attributes:
        kind: ``'layer'``, ``'activation'``, ``'sum'``, ``'kept'`` for one that only rearranges others, or ``'other'``.
        layer: Name of the layer that made it, through a BatchNorm or not.
        hosts: Names of the modules that return it, the innermost first.
        layers: Names of the layers that read it.
        activations: Names of the activation modules that read it.
        readers: Kinds of all readers but layers: ``'add'``, ``'activation'``, ``'relu'`` or ``'other'``.
        sources: What a kept value is made of.
        kept: Kept values that are made of it.
    """

    kind: str
    layer: str | None = None
    hosts: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    readers: set[str] = field(default_factory=set)
    sources: list[Value] = field(default_factory=list)
    kept: list[Value] = field(default_factory=list)

    def origins(self) -> list[Value]:
        """The values that a kept value is made of; else the value itself."""
        return [origin for source in self.sources for origin in source.origins()] if self.kind == 'kept' else [self]

    def root(self) -> Value:
        """The value that this one is a part or another arrangement of, so that one grid fits both."""
        return self.sources[0].root() if self.kind == 'kept' and len(self.sources) == 1 else self


@dataclass
class DataFlow:
    """What a run made and read.

    Attributes:
        values: All values in the order of the run.
        sums: The operands of each addition.
    """

    values: list[Value] = field(default_factory=list)
    sums: list[tuple[Value, Value]] = field(default_factory=list)


class _Watcher(TorchFunctionMode):
    """Records the values of a run: those of functions by this mode, those of modules by hooks."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.flow = DataFlow()
        self.names = {module: name for name, module in layers.items()}
        self.inside = 0
        # Tensors are held, so that no other gets the same id.
        self.held: dict[int, tuple[Tensor, Value]] = {}

    def value_of(self, tensor: Tensor) -> Value:
        return self.held[id(tensor)][1] if id(tensor) in self.held else self.make(tensor, Value('other'))

    def make(self, tensor: Tensor, value: Value) -> Value:
        self.held[id(tensor)] = (tensor, value)
        self.flow.values.append(value)
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # An operand may be changed in place.
        operands = [] if self.inside else [self.value_of(tensor) for tensor in _tensors((args, list(kwargs.values())))]
        result = func(*args, **kwargs)
        if operands:
            results = list(_tensors(result))
            if results:
                self._note(getattr(func, '__name__', ''), kwargs, operands, results)
        return result

    def _note(self, name: str, kwargs: Mapping[str, Any], operands: list[Value], results: list[Tensor]) -> None:
        keeps = name in KEEPING or (name == 'interpolate' and kwargs.get('mode', 'nearest') == 'nearest')
        if keeps:
            for tensor in results:
                if id(tensor) in self.held and self.value_of(tensor) in operands:
                    continue
                value = self.make(tensor, Value('kept', sources=operands))
                for operand in operands:
                    operand.kept.append(value)
            return
        if name in ADDITIONS and len(operands) == 2:
            kind, reader = 'sum', 'add'
            self.flow.sums.append((operands[0], operands[1]))
        elif name in RELU or name in FUNCTIONS:
            kind, reader = 'activation', 'relu' if name in RELU else 'activation'
        else:
            kind = reader = 'other'
        for operand in operands:
            operand.readers.add(reader)
        for tensor in results:
            self.make(tensor, Value(kind))

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_opaque(module):
            return
        if not self.inside or module in self.names:
            for index, tensor in enumerate(_tensors((args, list(kwargs.values())))):
                value = self.value_of(tensor)
                if module in self.names and index == 0:
                    value.layers.append(self.names[module])
                elif not isinstance(module, _BatchNorm):
                    value.readers.add(_reader(module))
                if isinstance(module, ACTIVATIONS):
                    value.activations.append(name)
        self.inside += 1

    def after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        opaque = self._is_opaque(module)
        self.inside -= opaque
        if not isinstance(output, Tensor):
            return
        if opaque and (not self.inside or module in self.names):
            source = self.value_of(args[0]) if args and isinstance(args[0], Tensor) else None
            if module in self.names:
                value = Value('layer', layer=self.names[module])
            elif isinstance(module, _BatchNorm) and source is not None and source.kind == 'layer':
                value = Value('layer', layer=source.layer)
            else:
                value = Value('activation' if isinstance(module, (*ACTIVATIONS, *CLIPPING)) else 'other')
            self.make(output, value)
        if not self.inside and id(output) in self.held and not isinstance(module, CONTAINERS):
            hosts = self.value_of(output).hosts
            if name not in hosts:
                hosts.append(name)

    def _is_opaque(self, module: nn.Module) -> bool:
        known = (*ACTIVATIONS, *CLIPPING, _BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Softmax)
        return module in self.names or isinstance(module, known)


def _reader(module: nn.Module) -> str:
    return 'relu' if isinstance(module, CLIPPING) else 'activation' if isinstance(module, ACTIVATIONS) else 'other'


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (tuple, list)):
        for item in nest:
            yield from _tensors(item)


@contextmanager
def watching(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[DataFlow]:
    """Record the values of the run inside the block.

    Args:
        model: The model that runs.
        layers: Its convolutions, linear layers and products of activations by name.

    Yields:
        The record, complete after the block.
    """
    watcher = _Watcher(layers)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            before, after = partial(watcher.before, name), partial(watcher.after, name)
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after).remove)
        with watcher:
            yield watcher.flow
    watcher.held.clear()


@dataclass
class Grids:
    """Which quantizers are shared, and which modules get one for their output.

    Attributes:
        groups: Names of layers and modules that share one quantizer: that of the inputs of the layers, and of the
            outputs of the modules.
        layer_of: Name of the module with the quantizer of a layer's output, by the name of the layer.
        sigmoids: Names of the SiLU modules whose sigmoid gets a grid.
        float_values: Values that should have a grid, but that no module returns; each by the name of a layer or
            module that made or read it.
    """

    groups: list[tuple[list[str], list[str]]] = field(default_factory=list)
    layer_of: dict[str, str] = field(default_factory=dict)
    sigmoids: list[str] = field(default_factory=list)
    float_values: list[str] = field(default_factory=list)


def choose_grids(
    flow: DataFlow, layers: Mapping[str, QuantizedLayer], last: Iterable[str], config: QuantizationConfig
) -> Grids:
    """Decide which values get a grid, and which quantizers are one.

    Args:
        flow: What the run made and read.
        layers: Quantized layers by name.
        last: Layers that make the model's output.
        config: Settings; ``outputs`` or ``target`` is set.

    Returns:
        The decision.
    """
    bits = config.value_bits
    sharing = {
        name for name, layer in layers.items() if layer.input_quantizer.bits == bits and input_scale(layer) is None
    }
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    def union(keys: list[str]) -> None:
        for key in keys:
            parent[find(key)] = find(keys[0])

    sharing_of: dict[Value, list[str]] = {}
    for value in flow.values:
        sharing_of.setdefault(value.root(), []).extend(f'layer:{name}' for name in value.layers if name in sharing)
    for names in sharing_of.values():
        union(names)

    def readers(value: Value) -> set[str]:
        found = value.readers - {'relu'}
        found |= {find(f'layer:{name}') if name in sharing else 'other' for name in value.layers}
        return found.union(*(readers(child) for child in value.kept))

    wanted = _shortcuts(flow, readers) if config.output_bits is None else _outputs(flow, readers, set(last), layers)
    by_host: dict[str, list[Value]] = {}
    for value in flow.values:
        for host in value.hosts:
            by_host.setdefault(host, []).append(value)
    chosen: list[tuple[Value, str]] = []
    missing: list[str] = []
    for value in wanted:
        candidates = value.hosts[:1] if value.kind == 'layer' else value.hosts
        free = [name for name in candidates if all(other in wanted for other in by_host[name])]
        if not free:
            missing += [*value.hosts[:1], *value.layers[:1]][:1]
        else:
            chosen.append((value, free[0]))
            union([f'host:{free[0]}', *sharing_of[value]])
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for key in list(parent):
        kind, _, name = key.partition(':')
        groups.setdefault(find(key), ([], []))[kind == 'host'].append(name)
    return Grids(
        [group for group in groups.values() if group[1] or len(group[0]) > 1],
        {value.layer: host for value, host in chosen if value.kind == 'layer' and value.layer is not None},
        list(dict.fromkeys(name for value, _ in chosen for name in value.activations)),
        list(dict.fromkeys(missing)),
    )


def _outputs(
    flow: DataFlow, readers: Callable[[Value], set[str]], last: set[str], layers: Mapping[str, QuantizedLayer]
) -> list[Value]:
    """Values whose makers ONNX Runtime runs in integers if they have a grid."""
    wanted = []
    for value in flow.values:
        found = readers(value)
        if value.kind not in ('layer', 'activation', 'sum') or not found:
            continue
        if value.kind == 'layer' and (value.layer in last or value.layer not in layers):
            continue
        if value.kind == 'sum' and found == {'other'}:
            continue
        if len(found) > 1 or not next(iter(found)).startswith('layer:'):
            wanted.append(value)
    return wanted


def _shortcuts(flow: DataFlow, readers: Callable[[Value], set[str]]) -> list[Value]:
    """The operand of each addition that layers read as well; else the second one, such as a downsampled shortcut."""
    wanted: list[Value] = []
    for operands in flow.sums:
        origins = [[o for o in value.origins() if o.kind != 'other'] for value in operands]
        read = [o for group in origins for o in group if any(key.startswith('layer:') for key in readers(o))]
        wanted += [value for value in read or origins[1] if value not in wanted]
    return wanted


def add_grids(model: nn.Module, grids: Grids, config: QuantizationConfig) -> None:
    """Attach the quantizers in place.

    Args:
        model: The model with quantized layers.
        grids: Result of :func:`choose_grids`.
        config: Settings of the quantizers.
    """
    modules = dict(model.named_modules())
    for layers, hosts in grids.groups:
        quantizer = config.input_quantizer(config.value_bits)
        for name in layers:
            layer = cast(QuantizedLayer, modules[name])
            layer.input_quantizer = quantizer.to(layer.weight.device).train(layer.training)
        for name in hosts:
            add_output_quantizer(modules[name], quantizer)
    for name in grids.sigmoids if config.output_bits is not None else ():
        module = modules[name]
        if type(module) in SIGMOID_PRODUCTS:
            module.__class__ = SIGMOID_PRODUCTS[type(module)]
            device = next(model.parameters()).device
            module.sigmoid_quantizer = SigmoidGrid().to(device).train(module.training)


def add_output_quantizer(module: nn.Module, quantizer: LSQ) -> None:
    """Let a module quantize its output.

    Args:
        module: A module that returns one tensor and does not call all of its children in turn.
        quantizer: It may be shared with other modules.
    """
    device = next((t.device for t in (*module.parameters(), *module.buffers())), quantizer.initialized.device)
    module.output_quantizer = quantizer.to(device).train(module.training)
    module.register_forward_hook(_quantize_output)


def _quantize_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    quantized: Tensor = module.output_quantizer(output)  # type: ignore[operator]
    return quantized
