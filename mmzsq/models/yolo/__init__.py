# SPDX-License-Identifier: Apache-2.0
"""Layers and post-processing that the YOLO families share."""
