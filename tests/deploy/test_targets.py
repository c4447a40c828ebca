# SPDX-License-Identifier: Apache-2.0
"""Models that are trained for ONNX Runtime or TensorRT run there in integers."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from quantized_networks import lowered
from safetensors.torch import load_file
from torch import Tensor, nn

from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.deploy import Session, export, verify
from mmzsq.deploy.dialects import check_tensorrt, container, float_in_tensorrt
from mmzsq.deploy.graph import Graph
from mmzsq.deploy.markers import ActivationGrid
from mmzsq.errors import UserError
from mmzsq.qat.dry_run import dry_run
from mmzsq.quantization import QuantizationConfig, calibrating, prepare, quantized_layers


def _fused(model: onnx.ModelProto | Path, tmp_path: Path) -> Counter[str]:
    """Operators that ONNX Runtime executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return Counter(node.op_type for node in onnx.load(tmp_path / 'optimized.onnx').graph.node)


def _calibrated(model: Any, x: Tensor, run: Any = None, **config: Any) -> Any:
    run = run or (lambda: model(x))
    model.report = prepare(model.eval(), QuantizationConfig.from_dict(config), run=run)
    with torch.no_grad(), calibrating(model):
        model(x)
    return model


def _demo(repo: Path, **config: Any) -> tuple[Any, Tensor]:
    register_all_modules()
    detector: Any = MODELS.build(Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model)
    detector.load_state_dict(load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors'))
    scenes = [torch.from_numpy(np.ascontiguousarray(draw_scene(0, index, 128).image)) for index in range(2)]
    images = torch.stack(scenes).permute(0, 3, 1, 2)[:, [2, 1, 0]].float() / 255
    return _calibrated(detector, images, lambda: dry_run(detector), **config), images


@pytest.fixture(scope='module')
def for_onnxruntime(repo: Path) -> tuple[Any, Tensor]:
    """The demo's detector with grids on outputs, and a batch."""
    return _demo(repo, target='onnxruntime')


def test_onnxruntime_fuses_every_layer_but_the_last(for_onnxruntime: Any, tmp_path: Path) -> None:
    detector, _ = for_onnxruntime
    file = tmp_path / 'demo.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        export(detector, file, target='onnxruntime', size=(128, 128), raw=True)
    fused = _fused(file, tmp_path)
    last = [row for row in detector.report.layers if 'last' in row.role]
    layers = len(list(quantized_layers(detector)))
    products = sum(type(module).__name__ == 'QuantSiLU' for module in detector.modules())
    concats = sum(node.op_type == 'Concat' for node in onnx.load(file).graph.node)
    sums = sum(node.op_type == 'Add' for node in onnx.load(file).graph.node)
    assert len(last) == 3 and sums and concats
    assert fused['Conv'] == len(last)
    assert fused['QLinearConv'] == layers - len(last) == products
    assert fused['QLinearSigmoid'] == fused['QLinearMul'] == products
    assert (fused['QLinearAdd'], fused['QLinearConcat']) == (sums, concats)
    assert not {'Add', 'Concat', 'MaxPool', 'Mul', 'Sigmoid', 'QuickGelu'} & set(fused)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_the_file_computes_what_was_simulated(for_onnxruntime: Any, tmp_path: Path, runtime: str) -> None:
    detector, images = for_onnxruntime
    report = export(detector, tmp_path / 'demo.onnx', target='onnxruntime', size=(128, 128))
    checks = verify(detector, report, images, runtime, threads=1)
    assert checks.passed, checks.failures
    assert all(check.integers_equal and check.difference < 1e-5 for check in checks.layers)
    assert {layer.batch_norm for layer in report.layers} == {'folded', None}
    bits = json.loads(Session(tmp_path / 'demo.onnx', 'onnxruntime').metadata['output_bits'])
    products = [name for name, module in detector.named_modules() if type(module).__name__ == 'QuantSiLU']
    # Each product, and the sigmoid inside of it; and layers and sums.
    assert {f'{name}.sigmoid' for name in products} < set(bits) and set(products) & set(bits)
    assert set(bits.values()) == {8}


def test_a_file_without_grids_on_outputs_comes_with_a_warning(repo: Path, tmp_path: Path) -> None:
    detector, _ = _demo(repo)
    with pytest.warns(UserWarning, match="slower than a float one.*zsq.quantizer.target='onnxruntime'"):
        export(detector, tmp_path / 'demo.onnx', target='onnxruntime', size=(128, 128), raw=True)
    assert _fused(tmp_path / 'demo.onnx', tmp_path)['QLinearConv'] == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        export(detector, tmp_path / 'demo.onnx', size=(128, 128), raw=True)


class Residual(nn.Module):
    """Two blocks with shortcuts, as in ResNet, and two branches of a concatenation."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.pool = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation()), nn.MaxPool2d(2)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.acts = nn.ModuleList(activation() for _ in range(2))
        self.branch, self.act, self.head = nn.Conv2d(8, 8, 1), activation(), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        for conv, bn, act in zip(self.convs, self.bns, self.acts, strict=True):
            x = act(x + bn(conv(x)))
        return self.head(torch.cat((x, self.act(self.branch(x))), 1))


def test_relu_networks_run_in_integers(assert_same: Any, tmp_path: Path) -> None:
    """ONNX Runtime merges a ReLU with the grid behind it, so that none is needed before it."""
    x = torch.randn(1, 3, 18, 18)
    model = _calibrated(Residual(), x, target='onnxruntime')
    built = assert_same(model, x, 'onnxruntime')
    fused = _fused(built.model, tmp_path)
    assert (fused['QLinearConv'], fused['QLinearAdd'], fused['Conv']) == (4, 2, 1)
    assert not {'Relu', 'Add', 'Concat', 'MaxPool'} & set(fused)


class Mlp(nn.Module):
    """Linear layers on regions, as in a box head, or on tokens, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('outputs', ['same', 8])
@pytest.mark.parametrize(('shape', 'product'), [((5, 48), 'QGemm'), ((2, 5, 48), 'MatMulIntegerToFloat')])
def test_linear_layers_run_in_integers_in_onnxruntime(
    assert_same: Any, tmp_path: Path, shape: tuple[int, ...], product: str, outputs: Any, per_channel: bool
) -> None:
    """Also those without a grid behind them, and with a bias that is not rounded."""
    x = torch.randn(*shape)
    config: dict[str, Any] = dict(w_bits=8, a_bits=8, weight=dict(per_channel=per_channel))
    model = _calibrated(Mlp(), x, **config, **(dict(outputs=outputs) if outputs == 8 else {}))
    built = assert_same(model, x, 'onnxruntime')
    fused = _fused(built.model, tmp_path)
    assert fused[product] == 2 and not {'Gemm', 'FusedGemm', 'MatMul', 'FusedMatMul'} & set(fused)
    assert built.slow == []
    graph = Graph(built.model)
    added = [name for node in graph.nodes if node.op_type == 'Add' for name in node.input if name in graph.constants]
    for name, layer in zip(added, (model.first, model.last), strict=True):
        assert np.array_equal(graph.constants[name].reshape(-1), layer.bias.detach().numpy())


def test_other_values_than_those_of_the_simulation_are_noticed(assert_same: Any) -> None:
    """The comparison above fails for another step of one output."""
    x = torch.randn(1, 3, 18, 18)
    model = _calibrated(Residual(nn.SiLU), x, target='onnxruntime')
    built = lowered(model, x, 'onnxruntime')
    with torch.no_grad():
        model.stem[1].output_quantizer.log_step += 0.1
    changed = lowered(model, x, 'onnxruntime')
    given, other = (
        onnxruntime.InferenceSession(b.model.SerializeToString()).run(None, {b.model.graph.input[0].name: x.numpy()})[0]
        for b in (built, changed)
    )
    assert np.abs(given - other).max() > 1e-3 * np.abs(given).max()


def test_tensorrt_takes_what_was_trained_for_it(assert_same: Any) -> None:
    x = torch.randn(1, 3, 18, 18)
    model = _calibrated(Residual(), x, target='tensorrt')
    built = assert_same(model, x, 'tensorrt')
    assert built.slow == []
    graph = Graph(built.model)
    assert check_tensorrt(graph) == []
    for node in graph.nodes:
        if node.op_type == 'Add':
            producers = [graph.producer(name).op_type for name in node.input]
            assert sorted(producers) == ['Conv', 'DequantizeLinear']
        if node.op_type == 'Concat':
            steps = [graph.constants[graph.producer(name).input[1]] for name in node.input]
            assert steps[0] == steps[1]
    integers = {graph.constants[node.input[2]].dtype for node in graph.nodes if node.op_type == 'QuantizeLinear'}
    assert integers == {np.dtype(np.int8)}


def test_tensorrt_refuses_and_warns(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 18, 18)
    with pytest.raises(UserError, match="zero point 0 alone.*train with zsq.quantizer.target='tensorrt'"):
        lowered(_calibrated(Residual(nn.SiLU), x), x, 'tensorrt')
    built = lowered(_calibrated(Residual(), x, activation=dict(scheme='signed')), x, 'tensorrt')
    assert len(built.slow) == 2
    assert all('neither operand of the addition is quantized' in problem for problem in built.slow)


def test_the_checker_sees_a_concatenation_of_different_steps() -> None:
    x = torch.randn(1, 3, 18, 18)
    graph = Graph(lowered(_calibrated(Residual(), x, target='tensorrt'), x, 'tensorrt').model)
    concat = next(node for node in graph.nodes if node.op_type == 'Concat')
    dequantize = graph.producer(concat.input[0])
    graph.set_input(dequantize, 1, graph.constant(np.float32(0.5), 'other_step'))
    assert any('different steps' in problem for problem in float_in_tensorrt(graph))


@pytest.mark.parametrize('bits', range(2, 8))
def test_offset_grids_of_up_to_7_bits_are_symmetric_int8(bits: int) -> None:
    """For every zero point, each level keeps its value as an int8 with zero point 0."""
    step, levels = np.float32(0.037), np.arange(2**bits)
    for zero_point in range(2**bits):
        held = container('x', ActivationGrid(float(step), zero_point, 0, 2**bits - 1, bits), 'tensorrt')
        assert held.zero_point == 0 and held.dtype == np.int8
        stored = np.arange(held.low, held.high + 1)
        assert np.array_equal(stored.astype(np.int8), stored)
        assert np.array_equal(stored.astype(np.int8) * step, (levels - zero_point).astype(np.float32) * step)
    with pytest.raises(UserError, match='zero point 0 alone'):
        container('x', ActivationGrid(float(step), 7, 0, 255, 8), 'tensorrt')
