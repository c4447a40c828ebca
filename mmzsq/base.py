# SPDX-License-Identifier: Apache-2.0
"""Find the base configs of this package for tools that do not import it.

``python -m mmzsq.base w4a8`` prints the absolute path of ``mmzsq::_base_/zsq_w4a8.py``. MMEngine resolves
``package::path`` for a fixed list of packages only. MMDetection's own ``tools/train.py`` therefore takes a path.
"""

from __future__ import annotations

import argparse
import sys

from mmzsq import cli
from mmzsq.compat import package_configs
from mmzsq.errors import UserError
from mmzsq.typed_section import nearest

PREFIX = 'zsq_'


def path(name: str) -> str:
    """Return the absolute path of a base.

    Args:
        name: Bits of weights and activations, for example ``'w4a8'``.

    Raises:
        UserError: If there is no such base. The message lists all.
    """
    found = names()
    if name not in found:
        raise UserError(f'mmzsq has no base {name!r}: choose one of {", ".join(found)}.{nearest(name, list(found))}')
    return found[name]


def names() -> dict[str, str]:
    """Return the absolute path of each base, by its bits.

    Raises:
        UserError: If the configs are not installed.
    """
    root = package_configs('mmzsq')
    if root is None:
        raise UserError('mmzsq was installed without its configs. Install it again: pip install mmzsq')
    return {file.stem.removeprefix(PREFIX): str(file) for file in sorted((root / '_base_').glob(f'{PREFIX}*.py'))}


def main() -> None:
    """Parse the command line and print one path, or the names of all bases."""
    options = argparse.ArgumentParser(description='Print the absolute path of a base config, for _base_ of a leaf.')
    options.add_argument('name', nargs='?', help='bits, such as w4a8 (default: list all)')
    name = options.parse_args().name
    sys.stdout.write(path(name) + '\n' if name else '\n'.join(names()) + '\n')


if __name__ == '__main__':
    cli.run(main)
