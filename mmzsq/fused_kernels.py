# SPDX-License-Identifier: Apache-2.0
"""Switch between fused Triton kernels and plain PyTorch operators (``MMZSQ_FUSED_KERNELS``).

Fused kernels run on CUDA by default. With ``MMZSQ_FUSED_KERNELS=0`` in the environment, PyTorch's own operators run
instead. They work on any GPU that PyTorch supports and give the same results up to rounding.

Fused kernels exist for fake quantization (``quantization/kernels.py``), and for synthesis: BatchNorm with its
statistics and total variation (``synthesis/kernels.py``), max pooling, upsampling and the blocks of an image
(``synthesis/layer_kernels.py``). The switch also controls how ``synthesis/acceleration.py`` rearranges the layers of
the frozen detector.
"""

from __future__ import annotations

import importlib.util
import os

VARIABLE = 'MMZSQ_FUSED_KERNELS'

HAS_TRITON = importlib.util.find_spec('triton') is not None
"""Whether the fused kernels can be compiled. The CUDA builds of PyTorch install Triton."""


def fused_kernels_enabled() -> bool:
    """Return whether the environment allows fused kernels. The variable is read at each call."""
    return os.environ.get(VARIABLE, '1') != '0'
