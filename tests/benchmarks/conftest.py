# SPDX-License-Identifier: Apache-2.0
"""Tests of the deployment benchmarks need the runtimes of the extra ``deploy``."""

from __future__ import annotations

from importlib.util import find_spec

RUNTIMES = ('onnx', 'onnxruntime', 'openvino')
collect_ignore = [] if all(find_spec(name) for name in RUNTIMES) else ['test_deploy_benchmarks.py']
