# SPDX-License-Identifier: Apache-2.0
"""Equivalent of ``python -m mmzsq.export``, beside the other tools."""

from mmzsq import cli
from mmzsq.export import main

if __name__ == '__main__':
    cli.run(main)
