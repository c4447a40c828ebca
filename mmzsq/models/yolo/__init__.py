# SPDX-License-Identifier: Apache-2.0
"""Layers and post-processing shared by YOLOv5 and YOLO11."""
