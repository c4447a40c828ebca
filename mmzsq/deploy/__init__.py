# SPDX-License-Identifier: Apache-2.0
"""Deployment of quantized detectors as ONNX files that compute with the trained integers."""
