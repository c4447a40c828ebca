# SPDX-License-Identifier: Apache-2.0
"""Zero-shot quantization of object detectors: a plugin for MMDetection 3.x."""

import sys

from mmzsq.requirements import MissingPackageError, check_packages
from mmzsq.version import __version__

# Before compat, which imports them.
try:
    check_packages()
except MissingPackageError as error:
    # Python imports the package of `python -m mmzsq.train` under this name. A command ends with one message.
    if sys.argv[:1] != ['-m']:
        raise
    sys.stderr.write(f'error: {error}\n')
    sys.exit(2)

from mmzsq import compat

compat.install()

__all__ = ['__version__']
