# SPDX-License-Identifier: Apache-2.0
"""The lowered graph computes what PyTorch simulates, with the integers of training."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantized_networks import lowered, outputs, quantized
from torch import Tensor, nn

from mmzsq.deploy.graph import Graph, attribute
from mmzsq.errors import UserError
from mmzsq.quantization import QuantMatmul, quantized_layers
from mmzsq.quantization.quantizers import LSQ

Check = Callable[..., Any]


def _bn(channels: int, gamma: list[float] | None = None) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels)
    with torch.no_grad():
        bn.weight.normal_()
        if gamma is not None:
            bn.weight[: len(gamma)] = torch.tensor(gamma)
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.1, 3.0)
    return bn


def _integers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Integers by layer, output channels first."""
    graph = Graph(model)
    found = {}
    for node in graph.nodes:
        if node.op_type == 'DequantizeLinear' and '/weight/' in node.name:
            transposed = graph.consumers(node.output[0])[0].op_type in ('MatMul', 'ConvTranspose')
            axis = attribute(node, 'axis') if graph.constants[node.input[1]].ndim else int(transposed)
            layer = node.name.split('/weight/')[0]
            found[layer] = np.moveaxis(graph.constants[node.input[0]].astype(np.int32), axis, 0)
    return found


def _assert_trained_integers(built: Any, model: nn.Module) -> None:
    found = _integers(built.model)
    for name, layer in quantized_layers(model):
        trained = layer.weight_quantizer.quantize(layer.filters()).numpy()
        assert found[name].shape == trained.shape
        for given, expected in zip(found[name], trained, strict=True):
            assert np.array_equal(given, expected) or np.array_equal(given, -expected), name


@pytest.mark.parametrize('target', ['openvino', 'onnxruntime', 'tensorrt'])
@pytest.mark.parametrize('bits', range(2, 9))
def test_convolutions_of_all_bits_with_negative_and_zero_gamma(assert_same: Check, bits: int, target: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        _bn(6, [1.0, -2.0, 0.0, -0.01]),
        nn.SiLU(),
        nn.Conv2d(6, 4, 1, bias=False),
        _bn(4),
    )
    scheme = 'signed' if target == 'tensorrt' and bits == 8 else 'offset'
    quantized(model, x, w_bits=bits, a_bits=bits, activation=dict(scheme=scheme))
    built = assert_same(model, x, target)
    _assert_trained_integers(built, model)
    assert [use.folded is not None for use in built.uses] == [True, True]
    assert {node.op_type for node in built.model.graph.node}.isdisjoint({'BatchNormalization'})


@pytest.mark.parametrize('scheme', ['signed', 'unsigned', 'offset'])
def test_every_activation_scheme_keeps_its_grid(assert_same: Check, scheme: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    quantized(model, x, w_bits=5, a_bits=6, activation=dict(scheme=scheme))
    # Values far outside of the grid saturate at its ends.
    assert_same(model, 10 * x)


@pytest.mark.parametrize(('bits', 'folds'), [(2, True), (4, True), (8, False)])
def test_the_lowest_integer_with_negative_gamma(assert_same: Check, bits: int, folds: bool) -> None:
    """-8 becomes 8, which int8 holds; -128 would become 128, so that BatchNorm stays."""
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _bn(4, [-1.0, -1.0, 1.0, 1.0]))
    quantized(model, x, w_bits=bits, a_bits=8, weight=dict(narrow=False))
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight[:, 0, 0, 0] = -10 * 2**bits * layer.weight_quantizer.step
    assert int(layer.weight_quantizer.quantize(layer.weight).min()) == -(2 ** (bits - 1))
    built = assert_same(model, x)
    _assert_trained_integers(built, model)
    assert (built.uses[0].folded is not None) == folds
    assert ('-128' in (built.uses[0].unfolded or '')) == (not folds)


def test_input_factors_are_divided_before_quantization(assert_same: Check) -> None:
    x = torch.randn(1, 4, 8, 8) * torch.tensor([0.1, 1.0, 5.0, 20.0]).view(-1, 1, 1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    quantized(model, x, w_bits=4, a_bits=4, equalize=True)
    layer: Any = model[0]
    assert float(layer.input_scale.max() / layer.input_scale.min()) > 2
    built = assert_same(model, x)
    assert [node.op_type for node in built.model.graph.node].count('Div') == 2


@pytest.mark.parametrize('bits', [3, 4, 6])
def test_input_factors_with_an_open_batch(assert_same: Check, bits: int) -> None:
    """OpenVINO merges division, Clip and QuantizeLinear wrongly where the batch is open."""
    x = torch.randn(2, 4, 8, 8) * torch.tensor([0.1, 1.0, 5.0, 20.0]).view(-1, 1, 1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    quantized(model, x, w_bits=bits, a_bits=bits, equalize=True)
    assert_same(model, x, dynamic_batch=True, output_names=['y'])


def test_a_slice_of_few_bits_is_not_clipped_again(assert_same: Check) -> None:
    """OpenVINO rounds some values of a Clip between two quantizers with one grid down."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[..., :6])

    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(1, 3, 8, 8)
        built = assert_same(quantized(Sliced(), x, w_bits=4, a_bits=4), x)
        assert [node.op_type for node in built.model.graph.node].count('Clip') == 1


@pytest.mark.parametrize('bits', [3, 8])
def test_grouped_depthwise_and_transposed_convolutions(assert_same: Check, bits: int) -> None:
    x = torch.randn(1, 4, 6, 6)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        _bn(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        _bn(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        _bn(6),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        _bn(4),
    )
    quantized(model, x, w_bits=bits, a_bits=bits)
    built = assert_same(model, x)
    _assert_trained_integers(built, model)
    # Steps of a grouped transposed convolution lie along no axis of its weight.
    assert [use.folded is not None for use in built.uses] == [True, True, True, False]


@pytest.mark.parametrize('per_channel', [True, False])
def test_linear_layers_of_two_and_three_dimensions(assert_same: Check, per_channel: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.pooled = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.pooled(self.tokens(x).relu().mean(1))

    x = torch.randn(2, 5, 6)
    model = quantized(Model(), x, w_bits=4, a_bits=8, weight=dict(per_channel=per_channel))
    _assert_trained_integers(assert_same(model, x), model)


def test_products_of_attention(assert_same: Check) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.compare, self.mix = nn.Linear(8, 24), QuantMatmul(), QuantMatmul()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return self.mix(self.compare(q, k.transpose(1, 2)).softmax(-1), v)

    x = torch.randn(2, 6, 8)
    model = Attention()
    model.compare.add_quantizers(LSQ(8, 'offset'), LSQ(8, 'offset'))
    model.mix.add_quantizers(LSQ(4, 'unsigned'), LSQ(6, 'signed'))
    quantized(model, x, w_bits=8, a_bits=8)
    built = assert_same(model, x)
    # One for the layer, one for each of four operands, and one above the transpose of the keys.
    assert [node.op_type for node in built.model.graph.node].count('QuantizeLinear') == 6


def test_a_layer_of_all_levels_has_one_set_of_integers_and_a_batch_norm_for_each(assert_same: Check) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bns = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList((_bn(4, [-1.0]), _bn(4, [1.0])))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(bn(self.conv(x[..., : 8 - 4 * index])) for index, bn in enumerate(self.bns))

    x = torch.randn(1, 3, 8, 8)
    model = quantized(Head(), x, w_bits=4, a_bits=4)
    built = assert_same(model, x)
    assert [(use.layer, use.call, use.folded is not None) for use in built.uses] == [
        ('conv', 0, True),
        ('conv', 1, True),
    ]


def test_other_padding_and_standardized_weights(assert_same: Check) -> None:
    from mmcv.cnn import ConvAWS2d, ConvWS2d

    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'), ConvWS2d(4, 6, 3), ConvAWS2d(6, 4, 3), nn.ReLU()
    )
    with torch.no_grad():
        model[2].weight_gamma.uniform_(0.5, 2.0)
    quantized(model, x, w_bits=6, a_bits=6)
    _assert_trained_integers(assert_same(model, x), model)


class _Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode='nearest')
        self.last, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = torch.cat((self.left(x), self.up(self.pool(self.right(x)))), 1)
        return self.last(x), self.other(x)


@pytest.mark.parametrize('bits', [4, 8])
def test_quantizers_move_up_without_changing_a_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 8, 8)
    model = quantized(_Concat(), x, w_bits=bits, a_bits=bits)
    moved = lowered(model, x)
    build = importlib.import_module('mmzsq.deploy.build')
    monkeypatch.setattr(build, 'move_up', lambda *_: 0)
    monkeypatch.setattr(build, 'share', lambda *_: 0)
    plain = lowered(model, x)
    counts = [[node.op_type for node in built.model.graph.node].count('QuantizeLinear') for built in (moved, plain)]
    # left and right share a grid, as do last and other; Concat, Resize and MaxPool get one at each input.
    assert counts == [3 + 4, 5]
    for given, expected in zip(outputs(moved, x, 'onnxruntime'), outputs(plain, x, 'onnxruntime'), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
def test_both_exporters_agree_with_pytorch(assert_same: Check, exporter: str) -> None:
    pytest.importorskip('onnxscript')
    x = torch.randn(2, 3, 8, 8)
    model = quantized(nn.Sequential(_Concat()), x, w_bits=8, a_bits=8)
    built = assert_same(model, x, exporter=exporter)
    assert len(built.uses) == 5


def test_int4_stores_half_bytes_and_computes_the_same(assert_same: Check) -> None:
    x = torch.randn(1, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), _bn(64))
    quantized(model, x, w_bits=4, a_bits=8, weight=dict(narrow=True))
    small = assert_same(model, x, int4=True)
    assert small.int4_layers == ['0', '2']
    kinds = {t.data_type for t in small.model.graph.initializer if t.name.endswith('weight_integers')}
    assert kinds == {onnx.TensorProto.INT4}
    assert small.model.ByteSize() < 0.7 * lowered(model, x).model.ByteSize()
    _assert_trained_integers(small, model)


def test_tensorrt_refuses_offset_activations_of_8_bits() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), x + 1, w_bits=8, a_bits=8)
    with pytest.raises(UserError, match='int8 with zero point 0 alone, but 0.input_quantizer has 8 bits'):
        lowered(model, x, 'tensorrt')


def test_tensorrt_gets_int8_with_zero_point_0() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3)), x + 1, w_bits=8, a_bits=7)
    graph = Graph(lowered(model, x, 'tensorrt').model)
    zero_points = [graph.constants[node.input[2]] for node in graph.nodes if node.op_type == 'QuantizeLinear']
    assert [(value.dtype, int(value)) for value in zero_points] == [(np.dtype(np.int8), 0)]


def test_openvino_never_gets_signed_activations() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = quantized(nn.Sequential(_Concat()), x, w_bits=8, a_bits=8, activation=dict(scheme='signed'))
    graph = Graph(lowered(model, x, 'openvino').model)
    kinds = {graph.constants[node.input[2]].dtype for node in graph.nodes if node.op_type == 'QuantizeLinear'}
    assert kinds == {np.dtype(np.uint8)}


def test_a_network_without_steps_is_refused() -> None:
    from mmzsq.quantization import QuantizationConfig, prepare

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    prepare(model, QuantizationConfig.from_dict(dict(first_bits='same', last_bits='same')))
    with pytest.raises(UserError, match='0.weight_quantizer has no step'):
        lowered(model, torch.randn(1, 3, 8, 8))


def test_tracing_leaves_no_trace() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), x, w_bits=4, a_bits=4).train()
    before = model.state_dict()
    lowered(model, x)
    assert model.training and model[1].training and 'forward' not in vars(model[0].input_quantizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _PoolsToSize(nn.Module):
    """Computes the kernel size of a pooling layer from sizes, as the merging cells of NAS-FPN do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        side = x.size(-1) // 4
        x = torch.max_pool2d(x, (x.shape[-2] // 2, side), (x.shape[-2] // 2, side))
        return self.last(x)


def test_numbers_computed_from_sizes_are_constants_if_the_batch_is_fixed(assert_same: Check) -> None:
    x = torch.randn(1, 3, 8, 12)
    model = _PoolsToSize()
    quantized(model, x)
    built = assert_same(model, x)
    assert {node.op_type for node in built.model.graph.node} <= {
        'Conv', 'MaxPool', 'QuantizeLinear', 'DequantizeLinear', 'Clip', 'Constant',
    }  # fmt: skip


def test_an_error_of_the_exporter_is_one_sentence() -> None:
    x = torch.randn(1, 3, 8, 12)
    model = _PoolsToSize()
    quantized(model, x)
    with pytest.raises(UserError) as raised:
        lowered(model, x, dynamic_batch=True)
    assert str(raised.value) == (
        "The network cannot be exported: PyTorch's exporter does not take it (a number that _PoolsToSize computes is "
        'not constant). Try it without --dynamic-batch.'
    )


class _PoolsAdaptively(nn.Module):
    """Pools a map to sizes that do and do not divide it, as a pyramid of pooled contexts does."""

    def __init__(self, pool: Callable[..., Tensor], sizes: list[Any]) -> None:
        super().__init__()
        self.pool, self.sizes = pool, sizes
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x)
        return [self.last(self.pool(x, size)) for size in self.sizes]


def test_adaptive_average_pooling_to_any_size(assert_same: Check) -> None:
    x = torch.randn(2, 3, 7, 12)
    model = _PoolsAdaptively(lambda x, size: nn.functional.adaptive_avg_pool2d(x, size), [1, 3, 6, (5, None), (7, 4)])
    quantized(model, x)
    assert_same(model, x)


def test_an_operator_that_cannot_be_exported_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 3, 7, 12)
    model = _PoolsAdaptively(lambda x, size: nn.functional.adaptive_max_pool2d(x, size), [3])
    quantized(model, x)
    with pytest.raises(UserError, match=r'does not take it \(adaptive_max_pool2d, output size .* input size\)\.$'):
        lowered(model, x)
    assert 'graph' not in ''.join(capfd.readouterr())


class _ForeignOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        return g.op('mmcv::Double', x).setType(x.type())


class _Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.conv(_ForeignOperator.apply(x))


def test_an_operator_that_onnx_lacks_is_refused() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = _Doubles()
    quantized(model, x)
    with pytest.raises(UserError, match='needs the operator mmcv::Double, which ONNX does not have'):
        lowered(model, x)
