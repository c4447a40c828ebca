# SPDX-License-Identifier: Apache-2.0
"""Verification cannot be fooled: whatever is changed in a file, it fails and names the layer or the entry."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import nn

from mmzsq.deploy import export, verify
from mmzsq.deploy.graph import Graph
from mmzsq.deploy.layer_checks import check_layers
from mmzsq.deploy.verify import check_metadata, check_outputs

LAYER = 'backbone.stage2.0.conv'
CLASSES = ('disc', 'ring', 'bar')
LAST = 'bbox_head.convs.0'


def _change(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """Change an initializer in place."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = np.array(numpy_helper.to_array(tensor))
    changed = np.asarray(change(values), dtype=values.dtype).reshape(values.shape)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def _node(model: onnx.ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _first_plus(amount: float) -> Callable[[np.ndarray], Any]:
    def change(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[0] += amount
        return values

    return change


def _weight(model: onnx.ModelProto) -> None:
    _change(model, f'{LAYER}.weight_integers', lambda v: np.where(v == v.max(), v - 1, v))


def _sign_of_a_channel(model: onnx.ModelProto) -> None:
    """The layer computes the same."""
    sign = np.array([-1, *[1] * (_length(model, f'{LAYER}.weight_step') - 1)])
    _change(model, f'{LAYER}.weight_integers', lambda v: v * sign[:, None, None, None])
    _change(model, f'{LAYER}.weight_step', lambda v: v * sign)


def _length(model: onnx.ModelProto, name: str) -> int:
    return next(int(tensor.dims[0]) for tensor in model.graph.initializer if tensor.name == name)


def _zero_point(model: onnx.ModelProto) -> None:
    _change(model, f'{LAYER}.input/0/zero_point', lambda v: v + 1)


def _clip(model: onnx.ModelProto) -> None:
    _change(model, f'{LAYER}.input/0/high', lambda v: v * 16 / 15)


def _missing_quantizer(model: onnx.ModelProto) -> None:
    first = next(node for node in model.graph.node if node.name == f'{LAYER}.input/0/clip')
    reader = next(node for node in model.graph.node if f'{LAYER}.input/0/dequantize_output' in node.input)
    reader.input[0] = first.input[0]


def _moved_quantizer(model: onnx.ModelProto) -> None:
    """From behind an activation function to the convolution in front of it."""
    graph = model.graph
    clip, dequantize = (_node(model, f'{LAYER}.input/0/{name}') for name in ('clip', 'dequantize'))
    activated = clip.input[0]
    product = next(node for node in graph.node if activated in node.output)
    while product.op_type != 'Mul':
        activated = product.input[0]
        product = next(node for node in graph.node if activated in node.output)
    before = product.input[0]
    reader = next(node for node in graph.node if dequantize.output[0] in node.input)
    reader.input[0] = clip.input[0]
    for node in graph.node:
        if before in node.input and node is not clip:
            for index, name in enumerate(node.input):
                if name == before:
                    node.input[index] = dequantize.output[0]
    clip.input[0] = before
    _sort(model)


def _added_quantizer(model: onnx.ModelProto) -> None:
    """In front of an activation function, with the grid of the layer behind it."""
    graph = model.graph
    grid = _node(model, f'{LAYER}.input/0/quantize').input[1:]
    sigmoid = next(node for node in graph.node if node.op_type == 'Sigmoid' and 'stage1' in node.name)
    graph.node.extend(
        [
            helper.make_node('QuantizeLinear', [sigmoid.input[0], *grid], ['more'], name='more/0/quantize'),
            helper.make_node('DequantizeLinear', ['more', *grid], ['added'], name='more/0/dequantize'),
        ]
    )
    sigmoid.input[0] = 'added'
    _sort(model)


def _activation_function(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == 'Sigmoid' and 'stage1' in node.name)
    node.op_type = 'HardSigmoid'


def _swapped_outputs_of_the_last_layer(model: onnx.ModelProto) -> None:
    """Scores of the first two classes, of the first anchor."""

    def swap(values: np.ndarray) -> np.ndarray:
        values[[5, 6]] = values[[6, 5]]
        return values

    for name in ('weight_integers', 'weight_step'):
        _change(model, f'{LAST}.{name}', swap)


def _decoding(model: onnx.ModelProto) -> None:
    """The last constant that boxes are multiplied by or added to."""
    constants = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    nodes = [node for node in model.graph.node if node.op_type in ('Add', 'Mul') and constants & set(node.input)]
    _change(model, (constants & set(nodes[-1].input)).pop(), lambda v: v * 1.001)


def _metadata(key: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == key)
        entry.value = json.dumps(value)

    return change


def _nms_threshold(model: onnx.ModelProto) -> None:
    _change(model, 'nms/score_threshold', lambda v: v * 0 + 0.02)


def _sort(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    graph.sort()
    nodes = [copy.deepcopy(node) for node in graph.nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


TAMPERING = {
    'weight': (_weight, LAYER, 'integers differ from those of training'),
    'sign of a channel': (_sign_of_a_channel, LAYER, 'integers differ from those of training'),
    'step of a weight': (
        lambda model: _change(model, f'{LAYER}.weight_step', _first_plus(1e-5)),
        LAYER,
        'the step of the weight differs',
    ),
    'bias': (lambda model: _change(model, f'{LAYER}.bias', _first_plus(1e-4)), LAYER, 'the bias differs'),
    'step of an input': (
        lambda model: _change(model, f'{LAYER}.input/0/step', lambda v: v * 1.00001),
        LAYER,
        'at its input, the step is',
    ),
    'zero point': (_zero_point, LAYER, 'the zero point is'),
    'clip': (_clip, LAYER, 'Clip does not end on levels of the grid'),
    'missing quantizer': (_missing_quantizer, LAYER, 'no quantizer at its input'),
    'moved quantizer': (_moved_quantizer, LAYER, ''),
    'added quantizer': (_added_quantizer, 'more_quantizer', 'training has no such quantizer'),
    'activation function': (_activation_function, 'backbone.stage1', 'the values that reach it differ'),
    'swapped classes': (_swapped_outputs_of_the_last_layer, LAST, 'integers differ'),
    'decoding': (_decoding, 'output', 'the values behind the last layers differ'),
    'class names': (_metadata('classes', ['ring', 'disc', 'bar']), 'metadata classes', 'must be ["disc", "ring"'),
    'mean': (_metadata('mean', [0.0, 0.0, 1.0]), 'metadata mean', 'must be [0.0, 0.0, 0.0]'),
    'order of channels': (_metadata('bgr_to_rgb', False), 'metadata bgr_to_rgb', 'must be true'),
    'bits': (_metadata('bits', {}), 'metadata bits', 'must be'),
    'target': (_metadata('target', 'tensorrt'), 'metadata target', 'must be openvino'),
    'NMS': (_nms_threshold, 'output detections', 'not the'),
}


@pytest.mark.parametrize('name', TAMPERING)
def test_a_changed_file_fails_and_the_cause_is_named(demo: Any, tmp_path: Path, name: str) -> None:
    detector, _, images = demo
    file = tmp_path / 'demo.onnx'
    report = export(detector, file, size=(128, 128), classes=CLASSES, nms=True)
    model = onnx.load(file)
    tamper, where, message = TAMPERING[name]
    tamper(model)
    onnx.save(model, file)
    checks = verify(detector, report, images, 'onnxruntime', threads=1, classes=CLASSES)
    assert not checks.passed
    assert any(where in failure and message in failure for failure in checks.failures), checks.failures


@pytest.mark.parametrize('name', ['weight', 'zero point', 'moved quantizer', 'activation function'])
def test_a_changed_file_fails_in_openvino_too(demo: Any, tmp_path: Path, name: str) -> None:
    detector, _, images = demo
    file = tmp_path / 'demo.onnx'
    report = export(detector, file, size=(128, 128))
    model = onnx.load(file)
    tamper, where, message = TAMPERING[name]
    tamper(model)
    onnx.save(model, file)
    checks = verify(detector, report, images, 'openvino', threads=1)
    assert any(where in failure and message in failure for failure in checks.failures), checks.failures


def test_the_noise_at_the_heads_hides_no_small_change(demo_8_bits: Any, tmp_path: Path) -> None:
    """A residual sum that is off by a thousandth is less than PyTorch differs from itself at the heads."""
    detector, _, images = demo_8_bits
    file = tmp_path / 'demo.onnx'
    report = export(detector, file, size=(128, 128))
    model = onnx.load(file)
    add = next(node for node in model.graph.node if node.op_type == 'Add' and 'backbone' in node.name)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.001), 'factor'))
    model.graph.node.append(helper.make_node('Mul', [add.input[0], 'factor'], ['scaled'], name='scaling'))
    add.input[0] = 'scaled'
    _sort(model)
    onnx.save(model, file)
    checks = verify(detector, report, images, 'onnxruntime', threads=1)
    assert all(output.passed for output in checks.outputs)
    assert 'the values that reach it differ from PyTorch' in checks.failures[0]


@pytest.mark.parametrize(
    ('output', 'factor', 'passed'), [('scores', 1.0, True), ('scores', 0.5, False), ('boxes', 1.0, False)]
)
def test_tiny_scores_may_differ_by_the_rounding_of_a_sigmoid(output: str, factor: float, passed: bool) -> None:
    class Head(nn.Module):
        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.sigmoid(inputs - 11),)

    inputs = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (scores,) = Head()(inputs)
    # Other sigmoids are off by parts in ten million of their range.
    noise = np.random.default_rng(0).uniform(-3e-7, 3e-7, scores.shape).astype(np.float32)
    part = SimpleNamespace(name='detector', module=Head(), output_names=(output,))
    session = lambda _: [factor * scores.numpy() + noise]  # noqa: E731
    (check,) = check_outputs(part.module, part, session, session, inputs)
    assert 1e-3 < check.difference
    assert check.passed == passed


def test_a_layer_in_float_is_missed(demo: Any, tmp_path: Path) -> None:
    detector, _, images = demo
    file = tmp_path / 'demo.onnx'
    report = export(detector, file, size=(128, 128))
    model = onnx.load(file)
    dequantize = _node(model, f'{LAYER}/weight/0/dequantize')
    dequantize.name = 'anonymous'
    onnx.save(model, file)
    checks = verify(detector, report, images, 'onnxruntime', threads=1)
    assert f'{LAYER}: it is in none of the files.' in checks.failures


def test_metadata_that_agree_with_the_export_must_normalize_as_the_detector_does(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries come from one function, so a mistake in it would be in the file and in what is expected."""
    detector, _, _ = demo
    module = __import__('importlib').import_module('mmzsq.deploy.export')
    monkeypatch.setattr(module, '_numbers', lambda value, default: [default] * 3)
    report = export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    failures = check_metadata(detector, report, (tmp_path / 'demo.onnx').read_bytes(), None, None)
    assert failures == ['metadata mean, std, bgr_to_rgb: they do not normalize an image as the data preprocessor does.']


def test_all_of_an_untouched_file_agrees(demo_8_bits: Any, tmp_path: Path) -> None:
    detector, _, images = demo_8_bits
    report = export(detector, tmp_path / 'demo.onnx', size=(128, 128))
    from mmzsq.deploy.heads import parts_of

    part = parts_of(detector, (128, 128), raw=False)[0]
    for runtime in ('onnxruntime', 'openvino'):
        checks, failures = check_layers(
            detector, part, Path(report.files['detector']).read_bytes(), images[:1], runtime, report.target
        )
        assert not failures and all(check.reason is None for check in checks)
        assert max(check.difference for check in checks) < 1e-5
        assert max(check.input_difference for check in checks) < 1e-5
