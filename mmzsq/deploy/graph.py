# SPDX-License-Identifier: Apache-2.0
"""Editable view of an ONNX graph: nodes, constants as numpy arrays, producers and consumers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

RANDOM = ('Bernoulli', 'Multinomial', 'RandomNormal', 'RandomNormalLike', 'RandomUniform', 'RandomUniformLike')


class Graph:
    """The main graph of an ONNX model.

    Initializers and ``Constant`` nodes become entries of ``constants``, and ``Identity`` nodes disappear. The same
    patterns therefore match the output of both exporters.

    Args:
        model: The model. It is copied, and subgraphs are not edited.

    Attributes:
        nodes: Nodes in topological order after :meth:`sort`.
        constants: Constant values by name.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        # Weights live in `constants` alone: a large detector would need gigabytes for copies of them.
        self._model = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        self._model.graph.name = graph.name
        self._model.graph.input.extend(graph.input)
        self._model.graph.output.extend(graph.output)
        self.constants: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in graph.output]
        self.nodes: list[NodeProto] = []
        for node in graph.node:
            if node.op_type == 'Constant' and not node.domain:
                self.constants[node.output[0]] = _constant_value(node)
            else:
                copied = NodeProto()
                copied.CopyFrom(node)
                # Tracebacks of the dynamo exporter.
                del copied.metadata_props[:]
                copied.doc_string = ''
                self.nodes.append(copied)
        self._names = {name for node in self.nodes for name in (*node.input, *node.output, node.name)}
        self._names.update(self.constants)
        self._producers: dict[str, NodeProto] | None = None
        self._consumers: dict[str, dict[int, NodeProto]] | None = None
        self._resolve_identities()

    def opset(self, domain: str = '') -> int:
        """Return the version of an operator set that the model imports, or 0 if it does not import it."""
        return next((o.version for o in self._model.opset_import if o.domain == domain), 0)

    @property
    def has_open_sizes(self) -> bool:
        """Whether a dimension of an input is not fixed."""
        return any(
            not dimension.HasField('dim_value')
            for value in self._model.graph.input
            if value.name in self.inputs
            for dimension in value.type.tensor_type.shape.dim
        )

    def set_opset(self, version: int) -> None:
        """Import another version of ONNX's operators. Every operator of the graph must mean the same in both."""
        for opset in self._model.opset_import:
            if opset.domain == '':
                opset.version = version
        self._model.ir_version = max(self._model.ir_version, 10)

    def producer(self, value: str) -> NodeProto | None:
        """Return the node that computes ``value``, or None for inputs and constants."""
        self._index()
        assert self._producers is not None
        return self._producers.get(value)

    def consumers(self, value: str) -> list[NodeProto]:
        """Return the nodes that read ``value``, each once."""
        self._index()
        assert self._consumers is not None
        return list(self._consumers.get(value, {}).values())

    def only_consumer(self, value: str) -> NodeProto | None:
        """Return the only node that reads ``value``, or None if there are others or it is an output of the graph."""
        nodes = self.consumers(value)
        return nodes[0] if len(nodes) == 1 and value not in self.outputs else None

    def add(
        self, op: str, inputs: Sequence[str], output: str | None = None, name: str | None = None, **attributes: Any
    ) -> str:
        """Append a node with one output.

        Args:
            op: Operator type.
            inputs: Names of the inputs.
            output: Name of the output. If None, it is derived from the node's name.
            name: Name of the node. If None, it is derived from the operator. A suffix makes it unique.
            **attributes: Attributes of the node.

        Returns:
            The name of the output.
        """
        name = self.fresh(name or op)
        output = self.fresh(f'{name}_output') if output is None else output
        self._names.update((name, output))
        self.insert(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def insert(self, node: NodeProto) -> None:
        """Append a node that was made elsewhere."""
        self.nodes.append(node)
        self._index_node(node)

    def constant(self, value: np.ndarray, name: str) -> str:
        """Add a constant.

        Args:
            value: The value. The initializer has its dtype and shape; a scalar has the shape ().
            name: Wanted name. A suffix makes it unique.

        Returns:
            The unique name.
        """
        name = self.fresh(name)
        self.constants[name] = np.asarray(value)
        return name

    def fresh(self, name: str) -> str:
        """Reserve ``name`` and return it, with a number appended if it is taken."""
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f'{name}_{count}'
        self._names.add(candidate)
        return candidate

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Remove nodes."""
        nodes = list(nodes)
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        for node in nodes:
            self._forget_node(node)

    def replace_uses(self, old: str, new: str) -> None:
        """Let every reader of ``old`` read ``new``. Outputs of the graph keep their names.

        Args:
            old: Name of the value to replace.
            new: Name of its replacement.
        """
        if old in self.outputs:
            before, after = self.producer(old), self.producer(new)
            if before is not None:
                _rename_output(before, old, self.fresh(f'{old}_replaced'))
            self.changed()
            if after is None or new in self.outputs:
                self.add('Identity', [new], output=old)
            else:
                _rename_output(after, new, old)
                self.changed()
                self._replace_inputs(new, old)
        else:
            self._replace_inputs(old, new)

    def set_input(self, node: NodeProto, index: int, value: str) -> None:
        """Let one input of a node read another value."""
        self._forget_node(node)
        node.input[index] = value
        self._index_node(node)

    def changed(self) -> None:
        """Discard the index of producers and consumers. Call it after editing a node directly."""
        self._producers = self._consumers = None

    def evaluate(self, value: str, given: Mapping[str, np.ndarray] | None = None) -> np.ndarray | None:
        """Compute a value from constants with ONNX's reference implementation.

        Args:
            value: Name of the value.
            given: Known values by name, such as an input.

        Returns:
            The value, or None if it depends on an input of the graph or on an operator that cannot be evaluated.
        """
        known = dict(given or {})
        if value in known or value in self.constants:
            return known[value] if value in known else self.constants[value]
        order: list[NodeProto] = []
        if not self._collect(value, known, order, set()):
            return None
        needed = dict.fromkeys(name for node in order for name in sources(node))
        made = {name for node in order for name in node.output}
        tensors = [_tensor(n, known[n] if n in known else self.constants[n]) for n in needed if n not in made]
        graph = helper.make_graph(order, 'constants', [], [onnx.ValueInfoProto(name=value)], tensors)
        try:
            evaluator = ReferenceEvaluator(
                helper.make_model(graph, opset_imports=[helper.make_opsetid('', self.opset())])
            )
            results: Any = evaluator.run(None, {})
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
        computed: np.ndarray = results[0]
        return computed

    def fold_constants(self) -> None:
        """Compute values that depend only on constants, such as sizes and grids of points."""
        constant: set[str] = set(self.constants)
        for node in self.nodes:
            if not node.domain and node.op_type not in RANDOM and all(n in constant for n in sources(node)):
                constant.update(node.output)
        folded = [node for node in self.nodes if node.output[0] in constant]
        read = {n for node in self.nodes if node.output[0] not in constant for n in sources(node)} | set(self.outputs)
        for name in {name for node in folded for name in node.output if name in read and name not in self.outputs}:
            value = self.evaluate(name)
            producer = self.producer(name)
            if value is not None and producer is not None and len(producer.output) == 1:
                self.remove([producer])
                self.constants[name] = value
        self.clean()

    def _collect(self, value: str, known: Mapping[str, Any], order: list[NodeProto], seen: set[str]) -> bool:
        """Append the nodes that ``value`` needs, producers first. Return False if it needs an input of the graph."""
        if not value or value in known or value in self.constants or value in seen:
            return True
        node = self.producer(value)
        if node is None or node.domain:
            return False
        if not all(self._collect(name, known, order, seen) for name in sources(node)):
            return False
        seen.update(node.output)
        order.append(node)
        return True

    def clean(self) -> None:
        """Remove nodes and constants on which no output depends, and sort the nodes."""
        self.sort()
        needed = set(self.outputs)
        kept: list[NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(sources(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}
        self.changed()

    def sort(self) -> None:
        """Sort nodes topologically, and keep their order where possible."""
        self._index()
        assert self._producers is not None
        done: set[int] = set()
        order: list[NodeProto] = []
        for root in self.nodes:
            stack = [(root, False)]
            while stack:
                node, expanded = stack.pop()
                if id(node) in done:
                    continue
                if expanded:
                    done.add(id(node))
                    order.append(node)
                    continue
                stack.append((node, True))
                above = (self._producers.get(name) for name in reversed(sources(node)))
                stack.extend((source, False) for source in above if source is not None and id(source) not in done)
        self.nodes = order

    def to_model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """Return the model with the edited graph.

        Args:
            metadata: Entries of ``metadata_props``.

        Returns:
            A checked model without unused nodes, constants and operator sets.
        """
        self.clean()
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        for value in list(graph.input):
            if value.name not in self.inputs:
                graph.input.remove(value)
        graph.node.extend(self.nodes)
        graph.initializer.extend(_tensor(name, value) for name, value in self.constants.items())
        domains = {node.domain for node in self.nodes} | {''}
        for opset in list(model.opset_import):
            if opset.domain not in domains:
                model.opset_import.remove(opset)
        model.producer_name = 'mmzsq'
        helper.set_model_props(model, dict(metadata or {}))
        if domains == {''}:
            onnx.checker.check_model(model)
        return model

    def _resolve_identities(self) -> None:
        for node in [node for node in self.nodes if node.op_type == 'Identity' and not node.domain]:
            source, target = node.input[0], node.output[0]
            if target in self.outputs:
                continue
            self.remove([node])
            if source in self.constants:
                self.constants[target] = self.constants[source]
            else:
                self._replace_inputs(target, source)

    def _replace_inputs(self, old: str, new: str) -> None:
        for node in self.consumers(old):
            self._forget_node(node)
            _replace_input(node, old, new)
            self._index_node(node)

    def _index(self) -> None:
        if self._producers is not None:
            return
        self._producers, self._consumers = {}, {}
        for node in self.nodes:
            self._index_node(node)

    def _index_node(self, node: NodeProto) -> None:
        if self._producers is None or self._consumers is None:
            return
        for name in node.output:
            self._producers[name] = node
        for name in sources(node):
            self._consumers.setdefault(name, {})[id(node)] = node

    def _forget_node(self, node: NodeProto) -> None:
        if self._producers is None or self._consumers is None:
            return
        for name in node.output:
            if self._producers.get(name) is node:
                del self._producers[name]
        for name in sources(node):
            self._consumers.get(name, {}).pop(id(node), None)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute of a node as a Python value, or ``default`` if the node lacks it."""
    for entry in node.attribute:
        if entry.name == name:
            value = helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def sources(node: NodeProto) -> list[str]:
    """Return the names that a node and its subgraphs read from the graph, each once."""
    names = [name for name in node.input if name]
    for entry in node.attribute:
        for graph in (entry.g, *entry.graphs) if entry.HasField('g') or entry.graphs else ():
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inside.update(name for child in graph.node for name in child.output)
            read = [name for child in graph.node for name in sources(child)]
            names += [n for n in (*read, *(value.name for value in graph.output)) if n not in inside]
    return list(dict.fromkeys(names))


def _replace_input(node: NodeProto, old: str, new: str) -> None:
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new
    for entry in node.attribute:
        for graph in (entry.g, *entry.graphs):
            for child in graph.node:
                _replace_input(child, old, new)


def _rename_output(node: NodeProto, old: str, new: str) -> None:
    node.output[list(node.output).index(old)] = new


def _constant_value(node: NodeProto) -> np.ndarray:
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        if entry.name == 'value':
            return numpy_helper.to_array(value)
        kinds = {'value_float': np.float32, 'value_floats': np.float32, 'value_int': np.int64, 'value_ints': np.int64}
        if entry.name in kinds:
            return np.asarray(value, dtype=kinds[entry.name])
    raise ValueError(f'constant {node.output[0]} has no value that is known')


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    # Not np.ascontiguousarray, which turns a scalar into shape (1,).
    return numpy_helper.from_array(np.asarray(value, order='C'), name)
