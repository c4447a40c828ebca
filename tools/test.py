# SPDX-License-Identifier: Apache-2.0
"""The same as ``python -m mmzsq.test``, where MMDetection's users look for it."""

from mmzsq import cli
from mmzsq.test import main

if __name__ == '__main__':
    cli.run(main)
