# SPDX-License-Identifier: Apache-2.0
"""Check that the packages of OpenMMLab are here, in versions that this package works with.

They are extras of the distribution, not requirements, because several distributions provide the same import packages.
``mmdet`` comes from ``mmdet`` or ``onedl-mmdetection``, ``mmengine`` from ``mmengine`` or ``onedl-mmengine``, and
``mmcv`` from ``mmcv``, ``mmcv-lite`` or ``onedl-mmcv``. A requirement on one of them would let pip write its files over
those of another.
"""

from __future__ import annotations

import importlib
import re

from mmzsq.errors import UserError

OLDEST = {'mmengine': '0.10.7', 'mmcv': '2.0.1', 'mmdet': '3.3.0'}
"""The oldest supported ``__version__`` by import package, in the order of their imports."""

INSTALL = (
    'Install what is missing with one of: '
    "pip install 'mmzsq[lite]' (MMDetection, MMEngine and mmcv-lite, which needs no compiler); "
    "pip install 'mmzsq[stock]' (MMDetection and MMEngine, beside an mmcv of your own); "
    "pip install 'mmzsq[onedl]' (the OneDL forks). Do not mix them: they overwrite each other's files."
)


class MissingPackageError(UserError, ImportError):
    """A package of OpenMMLab is missing, or too old or new for the others."""


def check_packages() -> None:
    """Import ``mmengine``, ``mmcv`` and ``mmdet``, and compare their versions with :data:`OLDEST`.

    Raises:
        MissingPackageError: If one is missing, too old, or refuses the version of another. The message names all
            that are missing or too old.
    """
    problems = []
    for name, oldest in OLDEST.items():
        try:
            version = str(importlib.import_module(name).__version__)
        except ModuleNotFoundError as error:
            # Otherwise a package that they need is missing, which Python's message names.
            if error.name not in OLDEST:
                raise
            if error.name == name:
                problems.append(f'{name} is not installed')
        except AssertionError as error:
            # MMDetection and MMYOLO refuse versions of the others that they do not know.
            problems.append(f'{name} cannot be imported: {error}')
        else:
            if _release(version) < _release(oldest):
                problems.append(f'{name} {version} is too old, {oldest} or later is needed')
    if problems == ['mmcv is not installed']:
        # Without dependencies, since mmcv-lite requires the stock MMEngine.
        raise MissingPackageError(
            'mmcv is not installed. Install it without a compiler: pip install --no-deps mmcv-lite==2.1.0'
        )
    if problems:
        raise MissingPackageError(f'{"; ".join(problems)}. {INSTALL}')


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a release: ``'3.5.1rc1+cu121'`` gives (3, 5, 1)."""
    found = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in found.group().split('.')) if found else ()
