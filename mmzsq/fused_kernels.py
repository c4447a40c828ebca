# SPDX-License-Identifier: Apache-2.0
"""Whether what is written by hand for speed may stand for PyTorch's operators.

It may, unless the environment says ``MMZSQ_FUSED_KERNELS=0``: then the general path runs, PyTorch's operators alone, on
any GPU that PyTorch knows, with the same results but for rounding. Fused are fake quantization
(``quantization/kernels.py``), and in synthesis BatchNorm with its statistics and total variation
(``synthesis/kernels.py``), and max pooling, upsampling and the blocks of an image (``synthesis/layer_kernels.py``);
``synthesis/acceleration.py`` rearranges layers of the frozen detector.
"""

from __future__ import annotations

import os

VARIABLE = 'MMZSQ_FUSED_KERNELS'


def fused_kernels_enabled() -> bool:
    """Whether the environment allows them; it is asked each time."""
    return os.environ.get(VARIABLE, '1') != '0'
