# SPDX-License-Identifier: Apache-2.0
"""Sessions of ONNX Runtime and OpenVINO behind one call."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mmzsq.errors import UserError

RUNTIMES = ('onnxruntime', 'openvino')


class Session:
    """A loaded file.

    Args:
        model: Path of an ONNX file, or its content.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        threads: Number of threads; 0 lets the runtime decide.
        precision: Precision of operators that OpenVINO does not compute in integers. Its default is bf16 on CPUs that
            have it, but training used f32.
        exact: Keep ONNX Runtime from rounding the bias of a convolution. If a quantizer directly follows, it rounds the
            bias to multiples of input step times weight step, which changes an output by at most half of such a
            multiple. With ``exact``, such a convolution runs in float.

    Attributes:
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        metadata: Entries of the file's ``metadata_props``.

    Raises:
        UserError: If the runtime is unknown or not installed, or the file does not exist.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        runtime: str = 'openvino',
        threads: int = 0,
        precision: str = 'f32',
        exact: bool = False,
    ) -> None:
        if runtime not in RUNTIMES:
            raise UserError(f'runtime is {runtime!r}, but must be one of {", ".join(map(repr, RUNTIMES))}.')
        if importlib.util.find_spec(runtime) is None:
            raise UserError(f'{runtime} is not installed: run `pip install "mmzsq[deploy]"`.')
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise UserError(f'{model} does not exist.')
            model = Path(model).read_bytes()
        self.runtime = runtime
        proto = onnx.load_from_string(model)
        self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
        self.inputs = [value.name for value in proto.graph.input]
        self.outputs = [value.name for value in proto.graph.output]
        self.input_shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
        self._session: Any = (
            _open_onnxruntime(model, threads, exact)
            if runtime == 'onnxruntime'
            else _open_openvino(model, threads, precision)
        )

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph.

        Args:
            inputs: Arrays in the order of :attr:`inputs`.

        Returns:
            Arrays in the order of :attr:`outputs`.
        """
        if self.runtime == 'onnxruntime':
            return list(self._session.run(None, dict(zip(self.inputs, inputs, strict=True))))
        results = self._session(list(inputs))
        return [np.array(results[index]) for index in range(len(self.outputs))]

    def executed(self) -> list[tuple[list[str], str, str]]:
        """List what OpenVINO runs.

        Returns:
            For each executed operator the names of the nodes fused into it, its type and its precision, such as
            ``(['/conv/Conv', '/Sigmoid'], 'Convolution', 'u8')``.
        """
        rows = []
        for node in self._session.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            names = info['originalLayersNames'].astype(str).split(',')
            rows.append((names, info['layerType'].astype(str), info['runtimePrecision'].astype(str)))
        return rows


def _open_onnxruntime(model: bytes, threads: int, exact: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Spinning threads of one session take the time of another.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    disabled = ['WeightBiasQuantization'] if exact else None
    return onnxruntime.InferenceSession(
        model, options, providers=['CPUExecutionProvider'], disabled_optimizers=disabled
    )


def _open_openvino(model: bytes, threads: int, precision: str) -> Any:
    core = openvino_core()
    config = {'INFERENCE_PRECISION_HINT': precision}
    if threads:
        config['INFERENCE_NUM_THREADS'] = str(threads)
    return core.compile_model(core.read_model(model), 'CPU', config)


@functools.cache
def openvino_core() -> Any:
    """Return OpenVINO's entry point, one for the process.

    Loading its plugins takes longer than compiling a layer. Its CPU plugin also sets the stack on which signals are
    handled, and restores the one it found. If a second core is released after the first, that stack is freed memory:
    on CPUs with AMX, the next signal then ends the process with a segmentation fault.
    """
    import openvino

    return openvino.Core()
