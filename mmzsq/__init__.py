# SPDX-License-Identifier: Apache-2.0
"""Zero-shot quantization of object detectors: a plugin for MMDetection 3.x."""

from mmzsq.requirements import check_packages
from mmzsq.version import __version__

# Before compat, which imports them.
check_packages()

from mmzsq import compat  # noqa: E402

compat.install()

__all__ = ['__version__']
