# SPDX-License-Identifier: Apache-2.0
"""What released OpenMMLab packages need on today's PyTorch."""


def install() -> None:
    """Apply all of it."""
