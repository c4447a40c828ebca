# SPDX-License-Identifier: Apache-2.0
"""Equivalent of ``python -m mmzsq.generate`` at MMDetection's usual path."""

from mmzsq import cli
from mmzsq.generate import main

if __name__ == '__main__':
    cli.run(main)
