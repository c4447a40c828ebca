# SPDX-License-Identifier: Apache-2.0
"""Equivalent of ``python -m mmzsq.quantize`` at MMDetection's usual path."""

from mmzsq import cli
from mmzsq.quantize import main

if __name__ == '__main__':
    cli.run(main)
