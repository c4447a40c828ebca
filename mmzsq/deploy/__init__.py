# SPDX-License-Identifier: Apache-2.0
"""Deployment of quantized detectors as ONNX files that compute with the trained integers.

    report = export(detector, 'yolov5-n.onnx', target='openvino', size=(640, 640))
    checks = verify(detector, report, runtime='openvino')
    results = OnnxDetector('yolov5-n.onnx', cfg)(['street.jpg'])

Needs ``pip install "mmzsq[deploy]"``.
"""

import importlib.util

from mmzsq.errors import UserError

if importlib.util.find_spec('onnx') is None:
    raise UserError('onnx is not installed: run `pip install "mmzsq[deploy]"`.')

from mmzsq.deploy.build import BuiltGraph, build
from mmzsq.deploy.dialects import TARGETS
from mmzsq.deploy.export import DeployReport, export, export_float
from mmzsq.deploy.markers import MarkedGraph, export_marked
from mmzsq.deploy.predictor import OnnxDetector, detector_of, read_metadata, runtime_for
from mmzsq.deploy.runtime import RUNTIMES, Session
from mmzsq.deploy.standalone import StandaloneDetector
from mmzsq.deploy.verify import VerifyReport, verify

__all__ = [
    'RUNTIMES',
    'TARGETS',
    'BuiltGraph',
    'DeployReport',
    'MarkedGraph',
    'OnnxDetector',
    'Session',
    'StandaloneDetector',
    'VerifyReport',
    'build',
    'detector_of',
    'export',
    'export_float',
    'export_marked',
    'read_metadata',
    'runtime_for',
    'verify',
]
