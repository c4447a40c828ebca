# SPDX-License-Identifier: Apache-2.0
"""Zero-shot quantization of object detectors: a plugin for MMDetection 3.x."""

from mmzsq import compat
from mmzsq.version import __version__

compat.install()

__all__ = ['__version__']
