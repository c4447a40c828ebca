# SPDX-License-Identifier: Apache-2.0
"""Operators of MMCV without a compiler, served by torchvision and PyTorch."""
