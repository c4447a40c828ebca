# SPDX-License-Identifier: Apache-2.0
"""Run a tool of MMDetection with this package imported: ``python -m mmzsq.stock TOOL ARGUMENTS``.

``python -m mmzsq.stock analysis_tools/browse_dataset CONFIG --not-show`` is MMDetection's
``tools/analysis_tools/browse_dataset.py CONFIG --not-show``. Because this package is imported first, bases named
``mmzsq::...`` are found, and with mmcv-lite the tools find its replacements of compiled operators.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import mmdet

import mmzsq  # noqa: F401  registers the package of configs and the operators
from mmzsq import cli
from mmzsq.errors import UserError


def tools_folder() -> Path:
    """Return the folder of MMDetection's tools.

    Raises:
        UserError: If this installation of MMDetection has none.
    """
    package = Path(mmdet.__file__).parent
    # A wheel has the first folder, an editable checkout the second.
    for folder in (package / '.mim' / 'tools', package.parent / 'tools'):
        if (folder / 'train.py').is_file():
            return folder
    raise UserError(f'the MMDetection in {package} was installed without its tools: install its wheel.')


def main() -> None:
    """Run the tool that the first argument names.

    Raises:
        UserError: If there is no such tool.
    """
    folder = tools_folder()
    names = sorted(str(path.relative_to(folder).with_suffix('')) for path in folder.rglob('*.py'))
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in (None, '-h', '--help'):
        sys.stdout.write(f'{__doc__}\nTools: {", ".join(names)}\n')
        return
    found = [known for known in names if known == str(name).removesuffix('.py') or known.endswith(f'/{name}')]
    if not found:
        raise UserError(f'MMDetection has no tool {name}. Its tools: {", ".join(names)}.')
    # analysis_tools/browse_dataset rather than analysis_tools/mot/browse_dataset.
    path = folder / f'{min(found, key=lambda known: known.count("/"))}.py'
    typed = sys.argv
    sys.argv = [str(path), *typed[2:]]
    # Python starts a script with its folder in front.
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name='__main__')
    finally:
        # Messages name the command as it was typed.
        sys.argv = typed


if __name__ == '__main__':
    cli.run(main)
