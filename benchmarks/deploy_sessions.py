# SPDX-License-Identifier: Apache-2.0
"""Sessions for the deployment benchmarks: files of any tool, run without copies of inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmzsq.deploy.runtime import openvino_core


class BoundSession:
    """A file with a fixed input that stays in place, so that a run is the network alone.

    Args:
        path: ``.onnx``, or ``.xml`` for OpenVINO.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        threads: Number of threads.
        inputs: Input array.
        precision: ``'f32'`` or ``'bf16'``: OpenVINO's precision of what is not in integers.
    """

    def __init__(self, path: Path, runtime: str, threads: int, inputs: np.ndarray, precision: str = 'f32') -> None:
        opened = _bind_onnxruntime if runtime == 'onnxruntime' else _bind_openvino
        self._run, self._outputs = opened(path, threads, inputs, precision)

    def run(self) -> None:
        """Run the network once on the input."""
        self._run()

    def outputs(self) -> list[np.ndarray]:
        """Return copies of the outputs of the last run, in the order of the file."""
        return [np.array(output) for output in self._outputs()]


def _bind_onnxruntime(path: Path, threads: int, inputs: np.ndarray, precision: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Spinning threads of one session take the time of another.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, inputs)
    for output in session.get_outputs():
        binding.bind_output(output.name, 'cpu')
    return (lambda: session.run_with_iobinding(binding)), binding.copy_outputs_to_cpu


def _bind_openvino(path: Path, threads: int, inputs: np.ndarray, precision: str) -> Any:
    import openvino

    # A second core in the process may crash at the next signal.
    core = openvino_core()
    options = {
        'INFERENCE_PRECISION_HINT': precision,
        'INFERENCE_NUM_THREADS': str(threads),
        'PERFORMANCE_HINT': 'LATENCY',
    }
    model = core.compile_model(core.read_model(str(path)), 'CPU', options)
    request = model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(inputs, shared_memory=True))

    def outputs() -> list[np.ndarray]:
        return [request.get_tensor(port).data for port in model.outputs]

    return request.infer, outputs
