# SPDX-License-Identifier: Apache-2.0
"""Equivalent of ``python -m mmzsq.predict`` at MMDetection's usual path."""

from mmzsq import cli
from mmzsq.predict import main

if __name__ == '__main__':
    cli.run(main)
