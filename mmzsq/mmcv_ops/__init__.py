# SPDX-License-Identifier: Apache-2.0
"""MMCV operators that need no compiler, implemented with torchvision and PyTorch."""
