# SPDX-License-Identifier: Apache-2.0
"""Error of OpenVINO for signed and unsigned activations behind a Concat.

    python benchmarks/openvino_signed_activations.py

Two random 8-bit convolutions are joined by a Concat and read by a third one. Both graphs hold the same steps and
weights. One stores activations as int8 with zero point 0, the other as uint8 with zero point 128. ONNX Runtime computes
the reference. The exporter writes no signed activations for OpenVINO because of this error.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import openvino
from onnx import NodeProto, TensorProto, helper, numpy_helper
from rich import print as show


class QuantizedNetwork:
    """Three convolutions with random integers.

    Args:
        dtype: Type of the activations.
        zero_point: Integer that represents zero.
    """

    def __init__(self, dtype: str, zero_point: int) -> None:
        self.dtype, self.zero_point = dtype, zero_point
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer and return its name."""
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def quantize(self, x: str, name: str) -> str:
        """Quantize and dequantize a value with a step of 0.05."""
        step = self.constant(f'{name}_step', np.asarray(0.05, np.float32))
        zero = self.constant(f'{name}_zero', np.asarray(self.zero_point, self.dtype))
        self.nodes.append(helper.make_node('QuantizeLinear', [x, step, zero], [f'{name}_integers']))
        self.nodes.append(helper.make_node('DequantizeLinear', [f'{name}_integers', step, zero], [name]))
        return name

    def convolve(self, x: str, name: str, weight: np.ndarray) -> str:
        """Convolve with int8 weights (C_out, C_in, 3, 3) and a step of 0.002 in each channel."""
        integers = self.constant(f'{name}_weight', weight)
        step = self.constant(f'{name}_step', np.full(len(weight), 0.002, np.float32))
        self.nodes.append(helper.make_node('DequantizeLinear', [integers, step], [f'{name}_filters'], axis=0))
        self.nodes.append(
            helper.make_node('Conv', [x, f'{name}_filters'], [name], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        )
        return name

    def model(self) -> bytes:
        """Return the ONNX file."""
        generator = np.random.default_rng(1)
        first, second, third = (
            generator.integers(-127, 128, (16, channels, 3, 3)).astype(np.int8) for channels in (16, 16, 32)
        )
        x = self.quantize('x', 'x_quantized')
        both = [self.convolve(x, 'first', first), self.convolve(x, 'second', second)]
        self.nodes.append(helper.make_node('Concat', both, ['joined'], axis=1))
        output = self.convolve(self.quantize('joined', 'joined_quantized'), 'third', third)
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 32, 32]) for name in ('x', output)]
        graph = helper.make_graph(self.nodes, 'network', values[:1], values[1:], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)])
        model.ir_version = 8
        content: bytes = model.SerializeToString()
        return content


def difference(model: bytes, x: np.ndarray) -> float:
    """Return the largest difference between OpenVINO and ONNX Runtime, relative to the largest output.

    Args:
        model: An ONNX file with one input and one output.
        x: The input.
    """
    expected = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider']).run(None, {'x': x})[0]
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return float(np.abs(expected - compiled({'x': x})[0]).max() / np.abs(expected).max())


def main() -> None:
    """Print both differences."""
    x = np.random.default_rng(0).normal(size=(1, 16, 32, 32)).astype(np.float32)
    show(f'onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}')
    for dtype, zero_point in (('int8', 0), ('uint8', 128)):
        show(f'{dtype:5} zero point {zero_point:3}: {difference(QuantizedNetwork(dtype, zero_point).model(), x):.1%}')


if __name__ == '__main__':
    main()
