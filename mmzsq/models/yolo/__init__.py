# SPDX-License-Identifier: Apache-2.0
"""Layers, backbone and neck structure, and post-processing shared by the YOLO models."""
