# SPDX-License-Identifier: Apache-2.0
"""Equivalent of ``python -m mmzsq.report``."""

from mmzsq import cli
from mmzsq.report.__main__ import main

if __name__ == '__main__':
    cli.run(main)
